"""One run: a method on a problem, with a curve of losses on three sets of examples.

A program is compiled once for a problem and a method; the numbers of a grid are its arguments. Only
the steps are timed, without compilation and without the evaluations in between.
"""

import dataclasses
import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optalr

from .methods import METHODS, Method
from .problems import Loaded, load_problem

# Points of a curve beside the start: of a run that is reported, and of one in a grid.
NUM_POINTS, NUM_GRID_POINTS = 16, 4
# Training examples that the loss is reported on; a quarter as many stretches of text.
_TRAIN_SHOWN = 1000


class Objective:
    """Losses and scores of a net on a task.

    The score is the accuracy; for a regression the mean squared error with a minus, so that more is
    better.
    """

    def __init__(self, loaded: Loaded):
        self.task = loaded.task
        self.net = loaded.problem.model(loaded.outputs)
        self.example = loaded.train.x[:1]

    def init(self, seed: int) -> tuple[Any, Any]:
        """Return parameters, and the statistics of batch normalization."""
        variables = self.first(jax.random.key(seed), self.example)
        return variables["params"], variables.get("batch_stats", {})

    @functools.cached_property
    def first(self) -> Any:
        """The program that makes a net's first variables."""
        return jax.jit(self.net.init)

    def outputs(self, params: Any, stats: Any, x: jax.Array, *, train: bool) -> tuple[Any, Any]:
        """Return the net's outputs, and new statistics where it trains."""
        variables = {"params": params, "batch_stats": stats}
        if not (train and stats):
            return self.net.apply(variables, x, train=train), stats
        outputs, changed = self.net.apply(variables, x, train=True, mutable=["batch_stats"])
        return outputs, changed["batch_stats"]

    def loss(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        """Return the mean loss."""
        if self.task == "regression":
            return jnp.mean((outputs - y) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    def score(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        """Return the mean score, of which more is better."""
        if self.task == "regression":
            return -self.loss(outputs, y)
        return jnp.mean(jnp.argmax(outputs, -1) == y)

    def train_loss(self, params: Any, stats: Any, x: jax.Array, y: jax.Array) -> Any:
        """Return the loss of a batch that is trained on, and new statistics."""
        outputs, stats = self.outputs(params, stats, x, train=True)
        return self.loss(outputs, y), stats


@dataclasses.dataclass(frozen=True)
class Runner:
    """The compiled programs of a method on a problem, the same for every seed.

    Attributes:
      like: the problem with the data of some seed; only its shapes count.
      method: what trains.
    """

    like: Loaded
    method: Method

    @functools.cached_property
    def objective(self) -> Objective:
        return Objective(self.like)

    def optimizer(self, numbers: dict[str, Any]) -> Any:
        """Return the method's transformation; ``numbers`` may be tracers."""
        return self.method.build(numbers, self.like.steps)

    def step(self, numbers: Any, carry: Any, batch: Any) -> Any:
        """Make one step, as a training loop would write it."""
        params, stats, state = carry
        (x, y), (px, py), validation_value = batch
        objective = self.objective
        tx = self.optimizer(numbers)

        def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> Any:
            return objective.train_loss(params, stats, x, y)

        if self.method.reads_signals:
            evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=True)
            wanted = optalr.wants_signals(state)
            (_, new), grads, extras = evaluate(params, x, y, signals=wanted)
        else:
            (_, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
            extras = {}
        if self.method.reads_validation:

            def probe(args: Any, params: Any) -> jax.Array:
                # Of a net with batch normalization the statistics of the probe's own batch: with
                # fixed ones a shorter kernel would seem to shrink the outputs.
                stats, px, py = args
                return objective.train_loss(params, stats, px, py)[0]

            extras["validation_value_fn"] = jax.tree_util.Partial(probe, (stats, px, py))
            extras["validation_value"] = validation_value
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), new, state

    @functools.cached_property
    def compiled(self) -> Any:
        """The program of one step, or of several in a loop."""

        def fetch(part: Any, index: jax.Array) -> Any:
            return part[0][index], part[1][index]

        def steps(numbers: Any, carry: Any, data: Any, entries: Any, value: Any) -> Any:
            def one(carry: Any, entry: Any) -> Any:
                training, probing, is_new = entry
                batch = fetch(data[0], training), fetch(data[1], probing), (value, is_new)
                return self.step(numbers, carry, batch), None

            if self.like.problem.loops:
                return jax.lax.scan(one, carry, entries)[0]
            (entry,) = zip(*entries, strict=True)
            return one(carry, entry)[0]

        return jax.jit(steps, donate_argnums=1)

    @functools.cached_property
    def evaluate(self) -> Any:
        """The program that returns losses and scores on the three sets."""
        objective = self.objective

        def measure(params: Any, stats: Any, part: Any) -> Any:
            outputs, _ = objective.outputs(params, stats, part[0], train=False)
            return objective.loss(outputs, part[1]), objective.score(outputs, part[1])

        def all_parts(params: Any, stats: Any, state: Any, parts: Any) -> jax.Array:
            params = self.method.shown(state, params)
            return jnp.array([measure(params, stats, part) for part in parts])

        return jax.jit(all_parts)

    def run(
        self, loaded: Loaded, numbers: dict[str, float], *, seed: int, num_points: int
    ) -> dict[str, Any]:
        """Train on the data of a seed, and return the record of the run.

        ``seconds`` are those of the steps by the clock. Processor time is beside them, since other
        work on the machine disturbs it less. ``compile_seconds`` is processor time as well: what
        the first call took beyond its steps, where the program is new. Chunks of other lengths
        compile too, but a training loop has one.
        """
        params, stats = self.objective.init(seed)
        traced = {name: jnp.float32(number) for name, number in numbers.items()}
        begun = time.process_time()
        carry = params, stats, jax.block_until_ready(self.start(traced, params))
        begun = time.process_time() - begun
        ends = np.linspace(0, loaded.steps, num_points + 1).round().astype(int)
        # A validation loss is new in the step after it was measured, and in no other.
        entries = *loaded.batches(seed), np.isin(np.arange(loaded.steps), ends)
        data = tuple((part.x, part.y) for part in (loaded.train, loaded.validation))
        curve, seconds, processor = [self._point(0, carry, loaded)], 0.0, 0.0
        # Compilation is not timed with the steps: first calls are on a copy.
        sizes = sorted({*np.diff(ends)} if loaded.problem.loops else {1})
        for size in sizes:
            warm = tuple(jnp.asarray(entry[:size]) for entry in entries)
            copy = jax.tree.map(jnp.copy, carry)
            start = time.process_time()
            jax.block_until_ready(self.compiled(traced, copy, data, warm, jnp.float32(1)))
            begun += time.process_time() - start if size == sizes[0] else 0
        for begin, end in itertools.pairwise(ends):
            value = jnp.float32(curve[-1][1][1][0])
            start, used = time.perf_counter(), time.process_time()
            size = end - begin if loaded.problem.loops else 1
            for at in range(begin, end, size):
                chunk = tuple(jnp.asarray(entry[at : at + size]) for entry in entries)
                carry = self.compiled(traced, carry, data, chunk, value)
            jax.block_until_ready(carry)
            seconds += time.perf_counter() - start
            processor += time.process_time() - used
            curve.append(self._point(int(end), carry, loaded))
            if not np.isfinite(curve[-1][1][0][0]):
                break
        return {
            "seconds": round(seconds, 4),
            "processor_seconds": round(processor, 4),
            "compile_seconds": round(max(0.0, begun - sizes[0] * processor / curve[-1][0]), 3),
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(carry[2])),
            "curve": _rounded(curve),
            "metrics": {key: float(v) for key, v in optalr.metrics(carry[2]).items()},
        }

    @functools.cached_property
    def start(self) -> Any:
        """The program that makes the optimizer's first state."""
        return jax.jit(lambda numbers, params: self.optimizer(numbers).init(params))

    def _point(self, step: int, carry: Any, loaded: Loaded) -> tuple[int, list[list[float]]]:
        params, stats, state = carry
        count = _TRAIN_SHOWN // 4 if loaded.task == "language" else _TRAIN_SHOWN
        shown = loaded.train.x[:count], loaded.train.y[:count]
        parts = shown, *((p.x, p.y) for p in (loaded.validation, loaded.test))
        return step, np.asarray(self.evaluate(params, stats, state, parts)).tolist()


def _rounded(curve: list[Any]) -> list[list[float]]:
    """Return the curve as rows: step, then loss and score on training, validation and test."""
    return [[step, *(float(f"{v:.5g}") for row in rows for v in row)] for step, rows in curve]


@functools.cache
def _runner(problem: str, method: str) -> Runner:
    return Runner(load_problem(problem, 0), METHODS[method])


def run(
    problem: str, method: str, numbers: dict[str, float], *, seed: int, num_points: int
) -> dict[str, Any]:
    """Train ``method`` on ``problem`` and return a record that can be stored as JSON."""
    start = time.perf_counter()
    runner = _runner(problem, method)
    result = runner.run(load_problem(problem, seed), numbers, seed=seed, num_points=num_points)
    whole = time.perf_counter() - start
    named = {"problem": problem, "method": method, "numbers": numbers, "seed": seed}
    return {**named, **result, "whole_seconds": round(whole, 2)}
