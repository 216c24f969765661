"""What a step costs after the switch to SGD, beside a step of plain ``optax.sgd``.

    python benchmarks/phases.py                      # a table, and JSON into results/
    python benchmarks/phases.py --models mlp --pairs 50

Each figure is the median ratio of alternating pairs within one process, of wall time and of the
process's CPU time (the steadier of the two on a loaded machine). Columns:

  first     TSO-ALRA before the switch, a step without signals and without roots
  traced    the same compiled step after the switch: the phase is a traced number
  released  after ``optalr.release_first_stage``, in a second compilation
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import signals as models

import optalr

RESULTS = pathlib.Path(__file__).parent / "results"
RATE = 1e-2


def plain_step(loss_fn, tx):
    def step(params, state, *batch):
        (value, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def signal_step(loss_fn, tx):
    evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=True, every=2, max_positions=16)

    def step(params, state, *batch):
        (value, _), grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


class Loop:
    """A training loop's arrays and its step."""

    def __init__(self, step, params, state, batch):
        self.step, self.batch = step, batch
        self.params, self.state = jax.tree.map(jnp.copy, (params, state))

    def advance(self):
        """Take one step; return its wall and CPU seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.params, self.state, value = self.step(self.params, self.state, *self.batch)
        jax.block_until_ready((self.params, self.state, value))
        return time.perf_counter() - wall, time.process_time() - cpu


def compare(baseline, other, pairs):
    """Return the median ratios of wall and of CPU time, ``other`` over ``baseline``."""
    for loop in (baseline, other):
        for _ in range(2):
            loop.advance()
    times = [(baseline.advance(), other.advance()) for _ in range(pairs)]
    return [statistics.median(b[i] / a[i] for a, b in times) for i in range(2)]


def measure(name, pairs):
    loss_fn, params, batch = models.make(name)
    sgd = optax.sgd(RATE, momentum=0.9)
    baseline = Loop(plain_step(loss_fn, sgd), params, sgd.init(params), batch)

    # No roots and no signals between steps 1 and 10^6: the bare step of the first phase.
    layout = optalr.coverage(loss_fn, params, *batch)
    tx = optalr.tso_alra(RATE, switch_at=10**6, update_every=10**6, layout=layout)
    first = Loop(signal_step(loss_fn, tx), params, tx.init(params), batch)
    row = {"first": compare(baseline, first, pairs)}

    tx = optalr.tso_alra(RATE, switch_at=1, second_learning_rate=RATE, layout=layout)
    step = signal_step(loss_fn, tx)
    traced = Loop(step, params, tx.init(params), batch)
    row["traced"] = compare(baseline, traced, pairs)

    released = Loop(step, params, optalr.release_first_stage(traced.state), batch)
    row["released"] = compare(baseline, released, pairs)
    return row


def table(results):
    lines = ["| model | first | traced | released |", "|---|---|---|---|"]
    for name, row in results.items():
        cells = " | ".join(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in row.values())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models.problems()))
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "phases.json")
    args = parser.parse_args()
    results = {}
    for name in args.models:
        results[name] = measure(name, args.pairs)
        print(table({name: results[name]}), flush=True)
    about = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "pairs": args.pairs,
    }
    args.out.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
