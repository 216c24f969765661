"""What a whole run costs with default settings, compilation apart, beside Adam's.

    python benchmarks/whole_run.py                        # every model, a table
    python benchmarks/whole_run.py --models mlp --steps 300

Three steps train the same model on the same batch: Adam, ``tso_alra`` as one program that asks its
clocks, and ``tso_alra`` through ``optalr.train_step``. The learning rate is tiny, so that nobody
diverges; the time does not depend on it. Each runs a hundred steps at a time, in turn, so that a
load on the machine meets all of them. Columns:

  compile            seconds to trace, lower and compile every kind of step
  first 100, all     time of the first hundred steps, and of all, over Adam's; without compilation
  switched           time of the last hundred steps, after the switch, over guarded SGD's
"""

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from signals import make, problems, table

import optalr

RATE = 1e-6
CHUNK = 100
KINDS = ("plain", "measuring", "refreshing", "second")


def traced(loss_fn: Callable[..., Any], tx: Any) -> Callable[..., Any]:
    """Return the step that asks its clocks on the device."""
    evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=True)

    def step(params: Any, state: Any, *batch: Any) -> Any:
        wanted = optalr.wants_signals(state)
        value, grads, extras = evaluate(params, *batch, signals=wanted)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


class Runner:
    """One optimizer on one model, with its own parameters and state."""

    def __init__(self, name: str, tx: Any, build: Callable[..., Any]):
        loss_fn, params, self.batch = make(name)
        self.tx, self.step = tx, build(loss_fn, tx)
        self.params, self.state = params, tx.init(params)

    def run(self, steps: int) -> float:
        """Return the seconds of some steps."""
        jax.block_until_ready(self.params)
        start = time.perf_counter()
        for _ in range(steps):
            self.params, self.state, _ = self.step(self.params, self.state, *self.batch)
        jax.block_until_ready(self.params)
        return time.perf_counter() - start

    def compile(self, kinds: tuple[str, ...]) -> float:
        """Return the seconds to compile these kinds of step, or the one program without kinds."""
        arguments = self.params, self.state, *self.batch
        start = time.perf_counter()
        for chosen in [{"kind": kind} for kind in kinds] or [{}]:
            self.step.lower(*arguments, **chosen).compile()
        return time.perf_counter() - start

    def begin_anew(self, name: str) -> None:
        """Start again, with all programs compiled."""
        _, self.params, _ = make(name)
        self.state = self.tx.init(self.params)


def measure(name: str, steps: int) -> dict[str, float]:
    """Return one row of the table."""

    def told(loss_fn: Any, tx: Any) -> Any:
        return optalr.train_step(loss_fn, tx, has_aux=True)

    switch = steps - CHUNK
    loss_fn, params, batch = make(name)
    layout = optalr.coverage(loss_fn, params, *batch)
    alra = optalr.tso_alra(RATE, switch_at=switch, layout=layout)
    runners = {
        "adam": Runner(name, optax.adam(RATE), told),
        "sgd": Runner(name, optax.chain(optalr.guard(optax.identity()), optax.scale(-RATE)), told),
        "traced": Runner(name, alra, traced),
        "told": Runner(name, alra, told),
    }
    kinds = {"told": KINDS, "traced": ()}
    compile_seconds = {}
    for label, runner in runners.items():
        compile_seconds[label] = runner.compile(kinds.get(label, ("plain",)))
        runner.run(steps)  # a compilation ahead of time is not remembered
        runner.begin_anew(name)
    chunks: dict[str, list[float]] = {label: [] for label in runners}
    for _ in range(steps // CHUNK):
        for label, runner in runners.items():
            chunks[label].append(runner.run(CHUNK))
    row = {"adam_ms": 1e3 * sum(chunks["adam"]) / steps}
    for label in ("adam", "traced", "told"):
        row[f"{label}_compile_s"] = compile_seconds[label]
    for label in ("traced", "told"):
        row[f"{label}_first_100"] = chunks[label][0] / chunks["adam"][0]
        row[f"{label}_all"] = sum(chunks[label]) / sum(chunks["adam"])
        row[f"{label}_switched"] = chunks[label][-1] / chunks["sgd"][-1]
    return row


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=problems(), default=list(problems()))
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__}, {device.device_kind}, {platform.machine()}, {options.steps} steps"
    )
    for name in options.models:
        print(table({name: measure(name, options.steps)}), flush=True)


if __name__ == "__main__":
    main()
