"""What a config determines and its seeds share: data, model, method, compiled functions."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.experiments.configs.config import Config
from optalr.experiments.configs.methods import build_method
from optalr.experiments.data import Dataset, load
from optalr.experiments.data.augment import Augmentation, build_augmentation
from optalr.experiments.errors import ExperimentError
from optalr.experiments.models import build_model
from optalr.experiments.training.objective import PROBLEMS
from optalr.experiments.training.steps import (
    TrainState,
    make_epoch,
    make_evaluation,
    make_loss,
    make_step,
)

# A streamed loop reports about once in this many seconds, and runs this many steps ahead.
_REPORT_SECONDS = 1.0
_STEPS_AHEAD = 4


class Segment(NamedTuple):
    """Steps that were taken in a row.

    Attributes:
      state: the state after them; the one before has been donated.
      measured: name to one float32 a step.
      seconds: what they took, compilation excluded.
    """

    state: TrainState
    measured: dict[str, np.ndarray]
    seconds: float


class Trainer:
    """One config made ready to train, with any seed."""

    def __init__(self, config: Config, dataset: Dataset | None = None):
        self.config = config
        self.dataset = load(config.data) if dataset is None else dataset
        self.batch_size = config.train.batch_size
        self._check_batch_size()
        self.steps_per_epoch = len(self.dataset.train) // self.batch_size
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.problem = PROBLEMS[self.dataset.task]
        self.model = build_model(config.model, self.dataset)
        self.loss_fn = make_loss(self.model, self.problem, self.dataset)
        self.given: dict[str, Any] = {"num_classes": self.dataset.num_classes}
        if self.dataset.task != "regression":
            self.given["loss"] = "softmax_cross_entropy"
        self.tx = build_method(
            config,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            given=self.given,
        )
        self.reads_validation = config.phase.name == "switch_on_plateau"
        self._check_validation()
        self.scans = self._choose_loop()
        self.augment = self._augmentation()
        probes = "validation_value_fn" in config.method.options.values()
        self.step = make_step(
            self.loss_fn,
            self.tx,
            self.problem,
            self.augment,
            validation=self.dataset.validation if probes else None,
        )
        self.evaluation = make_evaluation(self.model, self.problem, self.dataset)
        self._init = jax.jit(self._first_state)
        self.compile_seconds = 0.0
        # Made once: to make a key takes longer than to record a small step.
        self._keys: dict[int, jax.Array] = {}
        self._compiled: dict[Any, Any] = {}
        self._resident: tuple[jax.Array, jax.Array] | None = None

    def init(self, seed: int) -> TrainState:
        """Return the state before the first step."""
        return self._guard(self._init, self.key(seed))

    def compile(self) -> None:
        """Compile the training step, so that a mistake shows before anything is written.

        Raises:
          ExperimentError: the method wants what this experiment does not give.
        """
        state = self._guard(jax.eval_shape, self._init, self.key(0))
        if self.scans:
            self._epoch_function(state, 0, self.steps_per_epoch)
        else:
            self._step_function(state, 0)

    def segments(self, state: TrainState, seed: int, validation_value: float) -> Iterator[Segment]:
        """Train from ``state.step`` to the end of its epoch, a segment at a time.

        Args:
          state: the state to go on from; it is donated.
          seed: the run's.
          validation_value: the loss just measured, handed to the first step of an epoch.
        """
        done = int(state.step)
        epoch, start = divmod(done, self.steps_per_epoch)
        indices = self.order(seed, epoch)[start:]
        values = np.full(len(indices), np.nan, np.float32)
        if start == 0:
            values[0] = validation_value
        if self.scans:
            yield self._scan(state, seed, indices, values)
        else:
            yield from self._stream(state, seed, indices, values)

    def evaluate(self, state: TrainState, *names: str) -> dict[str, float]:
        """Return ``<split>_<measure>`` for each split named."""
        found = {}
        for name in names:
            split = getattr(self.dataset, name)
            measures = self.evaluation(state.params, state.model_state, split)
            found |= {f"{name}_{measure}": value for measure, value in measures.items()}
        return found

    def _first_state(self, key: jax.Array) -> TrainState:
        params, model_state = self.model.init(key)
        return TrainState(params, model_state, self.tx.init(params), jnp.int32(0))

    def _scan(self, state, seed, indices, values) -> Segment:
        run = self._epoch_function(state, seed, len(indices))
        key, data = self.key(seed), self.data()
        started = time.perf_counter()
        state, measured = run(state, key, *data, indices, values)
        measured = jax.device_get(measured)
        jax.block_until_ready(state)
        return Segment(state, measured, time.perf_counter() - started)

    def _stream(self, state, seed, indices, values) -> Iterator[Segment]:
        run, key = self._step_function(state, seed), self.key(seed)
        rows: list[dict[str, jax.Array]] = []
        ahead: deque[jax.Array] = deque()
        started = time.perf_counter()
        for i, (chosen, value) in enumerate(zip(indices, values, strict=True)):
            batch = self.dataset.train.take(chosen)
            state, measured = run(state, key, batch.x, batch.y, value)
            rows.append(measured)
            ahead.append(measured["loss"])
            if len(ahead) > _STEPS_AHEAD:
                ahead.popleft().block_until_ready()
            if i + 1 == len(indices) or time.perf_counter() - started > _REPORT_SECONDS:
                table = jax.device_get(rows)
                jax.block_until_ready(state)
                measured = {name: np.stack([row[name] for row in table]) for name in table[0]}
                yield Segment(state, measured, time.perf_counter() - started)
                rows, started = [], time.perf_counter()
                ahead.clear()

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the examples of each step of an epoch, a function of seed and epoch alone."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.dataset.train))
        kept = order[: self.steps_per_epoch * self.batch_size]
        return kept.reshape(self.steps_per_epoch, self.batch_size).astype(np.int32)

    def key(self, seed: int) -> jax.Array:
        """Return the key of a run, from which every step's own follows."""
        if seed not in self._keys:
            self._keys[seed] = jax.random.key(seed)
        return self._keys[seed]

    def data(self) -> tuple[jax.Array, jax.Array]:
        """Return the training examples on the device."""
        if self._resident is None:
            train = self.dataset.train
            self._resident = jnp.asarray(train.x), jnp.asarray(train.y)
        return self._resident

    def _epoch_function(self, state: Any, seed: int, num_steps: int) -> Any:
        def arguments():
            shape = (num_steps, self.batch_size)
            indices = jax.ShapeDtypeStruct(shape, jnp.int32)
            values = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
            return (state, self.key(seed), *self.data(), indices, values)

        return self._compile(("epoch", num_steps), make_epoch(self.step), arguments)

    def _step_function(self, state: Any, seed: int) -> Any:
        def arguments():
            batch = self.dataset.train.take(np.arange(self.batch_size))
            value = jax.ShapeDtypeStruct((), jnp.float32)
            return (state, self.key(seed), batch.x, batch.y, value)

        return self._compile(("step",), self.step, arguments)

    def _compile(self, name: Any, function: Any, arguments: Callable[[], Any]) -> Any:
        if name not in self._compiled:
            started = time.perf_counter()
            jitted, examples = jax.jit(function, donate_argnums=(0,)), arguments()
            self._compiled[name] = self._guard(lambda: jitted.lower(*examples).compile())
            self.compile_seconds += time.perf_counter() - started
        return self._compiled[name]

    def _guard(self, function: Any, *arguments: Any) -> Any:
        """Call ``function``; what a method refuses becomes one line that names it."""
        try:
            return function(*arguments)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ExperimentError(f"method {self.config.method.name!r}: {error}") from error

    def _augmentation(self) -> Augmentation | None:
        augment = build_augmentation(self.config.data.augment)
        shape = self.dataset.train.x.shape
        if augment is not None and len(shape) != 4:
            raise ExperimentError(
                f"data.augment changes images, and {self.dataset.name!r} has examples of shape "
                f"{shape[1:]}: leave it out."
            )
        return augment

    def _check_batch_size(self) -> None:
        if self.batch_size > len(self.dataset.train):
            raise ExperimentError(
                f"train.batch_size {self.batch_size} is larger than the "
                f"{len(self.dataset.train)} training examples of {self.dataset.name!r}: set "
                f"train.batch_size to at most {len(self.dataset.train)}."
            )

    def _check_validation(self) -> None:
        if self.reads_validation and not len(self.dataset.validation):
            raise ExperimentError(
                "phase 'switch_on_plateau' reads the validation loss and there are no validation "
                "examples: set data.validation_fraction."
            )

    def _choose_loop(self) -> bool:
        """Decide whether epochs are scanned."""
        loop = self.config.train.loop
        if loop != "auto":
            return loop == "scan"
        if self.dataset.train.x.nbytes > self.config.train.resident_bytes:
            return False
        return jax.default_backend() != "cpu" or not self.model.has_convolutions()
