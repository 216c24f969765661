"""What all seeds of a config share: data, model, method, compiled programs."""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.experiments.configs.calling import USER_ERRORS, reason
from optalr.experiments.configs.config import Config
from optalr.experiments.configs.methods import (
    build_method,
    keeps_parts,
    measures_all,
    probes_validation,
)
from optalr.experiments.data import Dataset, load
from optalr.experiments.errors import ExperimentError
from optalr.experiments.models import build_model
from optalr.experiments.processes import Team
from optalr.experiments.training import checks
from optalr.experiments.training.devices import make_mesh, placement_on
from optalr.experiments.training.objective import OBJECTIVES
from optalr.experiments.training.segments import Pace, Segment
from optalr.experiments.training.steps import (
    Batch,
    Batches,
    Measured,
    TrainState,
    make_epoch,
    make_evaluation,
    make_loss,
    make_step,
)

# A streamed loop runs this many steps ahead of the device: enough to hide the host's work, few
# enough that batches do not pile up in memory.
_STEPS_AHEAD = 4


class _Order(NamedTuple):
    """What the steps of a segment read beside the data; see ``Batches``."""

    indices: np.ndarray
    validation_values: np.ndarray


class Trainer:
    """One config made ready to train, with any seed.

    Args:
      config: the experiment.
      dataset: its data if they are loaded already, as in a comparison of several configs.
      team: the processes that train it together, each with a trainer of its own; by default one.

    Raises:
      ExperimentError: a name or argument of the config is unknown, or its parts do not fit.
    """

    def __init__(self, config: Config, dataset: Dataset | None = None, team: Team | None = None):
        self.config, self.team = config, team or Team()
        self.dataset = load(config.data) if dataset is None else dataset
        self.batch_size = config.train.batch_size
        self.steps_per_epoch = checks.steps_per_epoch(config, self.dataset)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.objective = OBJECTIVES[self.dataset.task]
        self.model = build_model(config.model, self.dataset)
        self.loss_fn = make_loss(self.model, self.objective, self.dataset)
        # Arguments that a method may ask for and that data and model determine.
        mesh, labelled = make_mesh(config.mesh, self.batch_size), self.dataset.task != "regression"
        self.given: dict[str, Any] = {"num_classes": self.dataset.num_classes, "mesh": mesh}
        self.given |= {"loss": "softmax_cross_entropy"} if labelled else {}
        self.tx = build_method(
            config,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            given=self.given,
        )
        self.reads_validation = checks.reads_validation(config, self.dataset)
        self.scans = checks.scans_epochs(config, self.dataset, self.model)
        self.augment = checks.augmentation(config, self.dataset)
        self.place, self._pace = placement_on(mesh), Pace(self.team)
        self.step = make_step(
            self.loss_fn,
            self.tx,
            self.objective,
            augment=self.augment,
            validation=self.dataset.validation if probes_validation(config) else None,
            sharding=self.place.by_examples,
            **({"max_cost": None} if measures_all(config) else {}),
            batch_sharding=self.place.by_examples if keeps_parts(config) else None,
        )
        self.evaluation = make_evaluation(
            self.model, self.objective, self.dataset, place=self.place
        )
        self.compile_seconds = 0.0
        # Keys are kept, because making one takes longer than recording a small step.
        self._keys: dict[int, jax.Array] = {}
        self._compiled: dict[int, Any] = {}
        self._resident: tuple[jax.Array, jax.Array] | None = None

    def init(self, seed: int) -> TrainState:
        """Return the state before the first step."""
        return self._guard(lambda: self._init(self.key(seed)))

    def compile(self) -> None:
        """Compile the training step, so that a mistake shows before anything is written.

        Raises:
          ExperimentError: the method wants what this experiment does not give.
        """
        state = self._guard(lambda: jax.eval_shape(self._first_state, self.key(0)))
        if self.scans:
            self._compile_epoch(state, self.key(0), self.steps_per_epoch)
        else:
            self._compile_step(state, self.key(0))

    def segments(self, state: TrainState, seed: int, validation_value: float) -> Iterator[Segment]:
        """Train from ``state.step`` to the end of its epoch, a segment at a time.

        Args:
          state: the state to go on from; it is donated.
          seed: the run's.
          validation_value: the loss just measured, handed to the first step of an epoch.
        """
        epoch, start = divmod(int(state.step), self.steps_per_epoch)
        indices = self.order(seed, epoch)[start:]
        values = np.full(len(indices), np.nan, np.float32)
        if start == 0:
            values[0] = validation_value
        order = _Order(indices, values)
        if self.scans:
            yield self._scan(state, self.key(seed), order)
        else:
            yield from self._stream(state, self.key(seed), order)

    def evaluate(self, state: TrainState, *names: str) -> dict[str, float]:
        """Return ``<split>_<measure>`` for each split named."""
        dataset = self.dataset
        splits = {
            "train": dataset.train,
            "validation": dataset.validation,
            "test": dataset.test,
        }
        found = {}
        for name in names:
            measures = self.evaluation(state.params, state.model_state, splits[name])
            found |= {f"{name}_{measure}": value for measure, value in measures.items()}
        return found

    def _first_state(self, key: jax.Array) -> TrainState:
        params, model_state = self.model.init(key)
        return TrainState(params, model_state, self.tx.init(params), jnp.int32(0))

    @functools.cached_property
    def _init(self) -> Callable[[jax.Array], TrainState]:
        return jax.jit(self._first_state, out_shardings=self._shardings)

    @functools.cached_property
    def _shardings(self) -> Any:
        """Where a state lies: on every device, but for factors that rest in parts."""
        everywhere = self.place.everywhere
        if everywhere is None:
            return None
        params, _ = jax.eval_shape(self.model.init, jax.random.key(0))
        return TrainState(everywhere, everywhere, self.place.of_state(self.tx, params), everywhere)

    def _scan(self, state: TrainState, key: jax.Array, order: _Order) -> Segment:
        run = self._compile_epoch(state, key, len(order.indices))
        batches = Batches(*self.data(), *order)
        started = time.perf_counter()
        state, measured = run(state, key, batches)
        measured = jax.device_get(measured)
        # What was measured may be ready before the state, whose time counts as well.
        jax.block_until_ready(state)
        return Segment(state, measured, time.perf_counter() - started)

    def _stream(self, state: TrainState, key: jax.Array, order: _Order) -> Iterator[Segment]:
        run = self._compile_step(state, key)
        rows: list[Measured] = []
        ahead: deque[jax.Array] = deque()
        self._pace.begin()
        for i, (chosen, value) in enumerate(zip(*order, strict=True)):
            examples = self.place.examples(self.dataset.train, chosen)
            state, measured = run(state, key, Batch(*examples, value))
            rows.append(measured)
            ahead.append(measured["loss"])
            if len(ahead) > _STEPS_AHEAD:
                ahead.popleft().block_until_ready()
            if self._pace.ends() or i + 1 == len(order.indices):
                table = jax.device_get(rows)
                jax.block_until_ready(state)
                seconds = self._pace.seconds()
                self._pace.plan()
                measured = {name: np.stack([row[name] for row in table]) for name in table[0]}
                yield Segment(state, measured, seconds)
                rows = []
                ahead.clear()
                self._pace.begin()

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the examples of each step of an epoch, a function of seed and epoch alone."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.dataset.train))
        kept = order[: self.steps_per_epoch * self.batch_size]
        return kept.reshape(self.steps_per_epoch, self.batch_size).astype(np.int32)

    def key(self, seed: int) -> jax.Array:
        """Return the key of a run, from which every step's own follows."""
        if seed not in self._keys:
            self._keys[seed] = self.place.key(seed)
        return self._keys[seed]

    def data(self) -> tuple[jax.Array, jax.Array]:
        """Return the training examples on the device."""
        if self._resident is None:
            train = self.dataset.train
            self._resident = self.place.whole(train.x), self.place.whole(train.y)
        return self._resident

    def _compile_epoch(self, state: Any, key: jax.Array, num_steps: int) -> Any:
        """Return the compiled scan of ``num_steps`` steps; what is compiled is kept."""

        def arguments():
            indices = jax.ShapeDtypeStruct((num_steps, self.batch_size), jnp.int32)
            values = jax.ShapeDtypeStruct((num_steps,), jnp.float32)
            return state, key, Batches(*self.data(), indices, values)

        return self._compile_once(num_steps, make_epoch(self.step), arguments)

    def _compile_step(self, state: Any, key: jax.Array) -> Any:
        """Return the compiled step; what is compiled is kept."""

        def arguments():
            examples = self.place.examples(self.dataset.train, np.arange(self.batch_size))
            value = jax.ShapeDtypeStruct((), jnp.float32)
            return state, key, Batch(*examples, value)

        return self._compile_once(1, self.step, arguments)

    def _compile_once(
        self, num_steps: int, function: Callable[..., Any], arguments: Callable[[], Any]
    ) -> Any:
        # A trainer either scans or streams, so the number of steps identifies a program.
        if num_steps not in self._compiled:
            started, where = time.perf_counter(), {}
            if self.place.everywhere is not None:
                where["in_shardings"] = self._shardings, self.place.everywhere, self._of_batches()
                where["out_shardings"] = self._shardings, self.place.everywhere
            jitted = jax.jit(function, donate_argnums=(0,), **where)
            examples = arguments()
            self._compiled[num_steps] = self._guard(lambda: jitted.lower(*examples).compile())
            self.compile_seconds += time.perf_counter() - started
        return self._compiled[num_steps]

    def _of_batches(self) -> Any:
        """Return where the data of a program lie: all on every device, or a batch in shares."""
        everywhere, shared = self.place.everywhere, self.place.by_examples
        return everywhere if self.scans else Batch(shared, shared, everywhere)

    def _guard(self, function: Any, *arguments: Any) -> Any:
        """Call ``function``; turn what a method refuses into one line that names it."""
        try:
            return function(*arguments)
        except USER_ERRORS as error:
            raise ExperimentError(f"method {self.config.method.name!r}: {reason(error)}") from error
