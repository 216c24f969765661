"""What rate the second stage of TSO-ALRA should have, on the development problems of `untuned`.

One first stage is trained up to the switch. From there training goes on in several ways, each from
the same state: with the first stage, with plain SGD at the same rate, and with SGD at other rates.

    python benchmarks/second_stage.py --seeds 2 --switch 0.15

A line has training, validation and test loss at the end, and the accuracy on the test examples.
*Along* and *length* are plain SGD at the rate times E⟨u, g/‖g‖⟩/E‖g‖ and E‖u‖/E‖g‖, with u the
first stage's updates and averages at the switch, times the factor behind them. *Along* is what
``tso_alra(second_learning_rate="matched")`` does. All five problems with two seeds take about half
an hour on a core.
"""

import argparse
import dataclasses
import functools
import os
from typing import Any

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from untuned_parts.methods import Method, schedule
from untuned_parts.problems import PROBLEMS, Loaded, load_problem
from untuned_parts.running import Runner

import optalr

DEVELOPMENT = [name for name, problem in PROBLEMS.items() if problem.role == "development"]
# The ways to go on: what the rate is multiplied by, and SGD's momentum.
NO_SWITCH = "no switch"
WAYS: dict[str, tuple[str, float, float]] = {
    NO_SWITCH: ("", 0.0, 0.0),
    "same rate": ("", 1.0, 0.0),
    "same rate, momentum 0.9": ("", 1.0, 0.9),
    "along": ("along", 1.0, 0.0),
    "along × 3": ("along", 3.0, 0.0),
    "along, momentum 0.9": ("along", 0.1, 0.9),
    "length × 0.1": ("length", 0.1, 0.0),
    "length × 0.3": ("length", 0.3, 0.0),
    "length": ("length", 1.0, 0.0),
}
_CHUNKS = 20  # parts of a run; the switch lies between two of them
_DECAY = 0.95  # of the averages


@dataclasses.dataclass(frozen=True)
class Branches:
    """The programs of the two stages on one problem."""

    like: Loaded

    @functools.cached_property
    def runner(self) -> Runner:
        none = Method("second_stage", "", lambda numbers, steps: optax.identity())
        return Runner(self.like, none)

    def first(self, numbers: dict[str, Any]) -> optax.GradientTransformation:
        """Return the direction of the first stage."""
        direction = optalr.scale_by_kronecker(damping=numbers["damping"], update_every=50)
        return optax.chain(direction, optax.trace(numbers["momentum"]))

    def rate(self, numbers: dict[str, Any], step: jax.Array) -> jax.Array:
        return schedule(numbers["rate"], self.like.steps)(step)

    def first_step(self, numbers: Any, carry: Any, batch: Any) -> Any:
        """Make a step of the first stage, and average what it does along the gradient."""
        params, stats, state, means, step = carry
        loss = functools.partial(self.loss, stats)
        evaluate = optalr.value_grad_and_extras(loss, has_aux=True)
        wanted = optalr.wants_signals(state)
        (_, stats), grads, extras = evaluate(params, *batch, signals=wanted)
        updates, state = self.first(numbers).update(grads, state, params, **extras)
        norm = optax.global_norm(grads)
        along = optax.tree.vdot(updates, grads) / norm
        new = jnp.array([along, optax.global_norm(updates), norm])
        means = _DECAY * means + (1 - _DECAY) * new
        rate = self.rate(numbers, step)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return params, stats, state, means, step + 1

    def second_step(self, numbers: Any, carry: Any, batch: Any) -> Any:
        """Make a step of SGD."""
        params, stats, trace, means, step = carry
        loss = functools.partial(self.loss, stats)
        (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
        trace = jax.tree.map(lambda t, g: numbers["second_momentum"] * t + g, trace, grads)
        rate = self.rate(numbers, step) * numbers["factor"]
        params = jax.tree.map(lambda p, u: p - rate * u, params, trace)
        return params, stats, trace, means, step + 1

    def loss(self, stats: Any, params: Any, x: jax.Array, y: jax.Array) -> Any:
        return self.runner.objective.train_loss(params, stats, x, y)

    @functools.cached_property
    def compiled(self) -> dict[bool, Any]:
        """The programs of a chunk of steps, of the first stage (True) and the second."""

        def program(step: Any) -> Any:
            def steps(numbers: Any, carry: Any, data: Any, entries: jax.Array) -> Any:
                def one(carry: Any, entry: jax.Array) -> Any:
                    return step(numbers, carry, (data[0][entry], data[1][entry])), None

                if self.like.problem.loops:
                    return jax.lax.scan(one, carry, entries)[0]
                return one(carry, entries[0])[0]

            return jax.jit(steps)

        return {True: program(self.first_step), False: program(self.second_step)}

    def advance(self, is_first: bool, numbers: Any, carry: Any, data: Any, entries: Any) -> Any:
        """Train over ``entries``, a chunk (or, without a loop, a step) at a time."""
        size = max(1, self.like.steps // _CHUNKS) if self.like.problem.loops else 1
        for start in range(0, len(entries), size):
            part = jnp.asarray(entries[start : start + size])
            carry = self.compiled[is_first](numbers, carry, data, part)
        return carry

    def run(
        self, numbers: dict[str, float], ways: list[str], *, seed: int, switch: float
    ) -> dict[str, Any]:
        """Return the losses and the accuracy at the switch, and at the end of each way."""
        loaded = load_problem(self.like.problem.name, seed)
        at = round(switch * _CHUNKS) * max(1, loaded.steps // _CHUNKS)
        entries, data = loaded.batches(seed)[0], (loaded.train.x, loaded.train.y)
        traced = {name: jnp.float32(number) for name, number in numbers.items()}
        params, stats = self.runner.objective.init(seed)
        state = jax.jit(self.first(traced).init)(params)
        start = params, stats, state, jnp.zeros(3), jnp.zeros((), jnp.int32)
        carry = self.advance(True, traced, start, data, entries[:at])
        ends = {"at the switch": carry}
        if NO_SWITCH in ways:
            ends[NO_SWITCH] = self.advance(True, traced, carry, data, entries[at:])
        along, length, norm = np.asarray(carry[3])
        measured = {"": 1.0, "along": along / norm, "length": length / norm}
        zeros = jax.tree.map(jnp.zeros_like, carry[0])
        for name in [way for way in ways if way != NO_SWITCH]:
            unit, factor, momentum = WAYS[name]
            more = {"factor": measured[unit] * factor, "second_momentum": momentum}
            more = {key: jnp.float32(number) for key, number in more.items()}
            begun = *carry[:2], zeros, *carry[3:]
            ends[name] = self.advance(False, {**traced, **more}, begun, data, entries[at:])
        return {name: self.measure(end, loaded) for name, end in ends.items()}

    def measure(self, carry: Any, loaded: Loaded) -> list[float]:
        """Return training, validation and test loss, and the accuracy on the test examples."""
        params, stats = carry[:2]
        parts = [(loaded.train.x[:1000], loaded.train.y[:1000])]
        parts += [(part.x, part.y) for part in (loaded.validation, loaded.test)]
        losses = np.asarray(self.runner.evaluate(params, stats, None, parts))
        return [*losses[:, 0].tolist(), losses[-1, 1].item()]


def main() -> None:
    """Print a line for every problem, seed and way to go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", nargs="*", default=DEVELOPMENT)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--switch", type=float, default=0.15, help="part of the run, in twentieths")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    args = parser.parse_args()
    numbers = {"rate": args.rate, "momentum": args.momentum, "damping": args.damping}
    for problem in args.problems:
        branches = Branches(load_problem(problem, 0))
        for seed in range(args.seeds):
            found = branches.run(numbers, args.ways, seed=seed, switch=args.switch)
            for way, losses in found.items():
                shown = "  ".join(f"{loss:.4f}" for loss in losses)
                print(f"{problem:18}  seed {seed}  {way:24}  {shown}", flush=True)


if __name__ == "__main__":
    main()
