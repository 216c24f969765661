"""What a rate that sets itself costs beside a plain SGD step: flops, time and memory.

    python benchmarks/rates.py                       # all models, table and JSON into results/
    python benchmarks/rates.py --models mlp --repeats 20

Flops are the compiler's count for a whole training step, over that for SGD's. Times are medians of
the ratio of alternating pairs within one process. The floor of the exact second order is 8/3: five
products a layer against the gradient's three.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

import flax.linen as nn
import jax
import optax

import optalr

RESULTS = pathlib.Path(__file__).parent / "results"


class MLP(nn.Module):
    """784-512-512-10."""

    @nn.compact
    def __call__(self, x):
        for width in (512, 512):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class VGG(nn.Module):
    """Six 3×3 convolutions 32-32-64-64-128-128 and two dense layers."""

    @nn.compact
    def __call__(self, x):
        for width in (32, 64, 128):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


PROBLEMS = {"mlp": (MLP(), (128, 784)), "vgg": (VGG(), (64, 32, 32, 3))}
EVERY = 10


def methods():
    """Name -> transformation; a small initial rate keeps the weights ordinary."""
    return {
        "exact, order 2": optalr.learned_rate_sgd(1e-3),
        "exact, order 1": optalr.learned_rate_sgd(1e-3, order=1),
        "five evaluations": optalr.learned_rate_sgd(1e-3, derivatives="finite_differences"),
        f"exact, order 2, every {EVERY}": optalr.learned_rate_sgd(1e-3, every=EVERY),
        "exact, order 2, a quarter of the batch": optalr.learned_rate_sgd(1e-3, probe="quarter"),
        "successive gradients": optalr.learned_rate_sgd(
            1e-3, order=1, derivatives="successive_gradients"
        ),
        "lipschitz": optalr.lipschitz_sgd("softmax", num_classes=10),
    }


def make_step(loss_fn, tx):
    evaluate = optalr.value_grad_and_extras(loss_fn)

    def step(params, state, x, y):
        value, grads, extras = evaluate(params, x, y)
        part = len(x) // 4
        quarter = jax.tree_util.Partial(lambda batch, p: loss_fn(p, *batch), (x[:part], y[:part]))
        updates, state = tx.update(grads, state, params, **extras, quarter=quarter)
        return optax.apply_updates(params, updates), state, value

    return step


class Compiled:
    """One compiled training step that goes on from where it was."""

    def __init__(self, loss_fn, tx, *, params, batch):
        self.state, self.batch = (params, tx.init(params)), batch
        self.executable = (
            jax.jit(make_step(loss_fn, tx)).lower(params, self.state[1], *batch).compile()
        )
        cost = self.executable.cost_analysis()
        self.flops = (cost[0] if isinstance(cost, list) else cost)["flops"]
        self.memory = self.executable.memory_analysis().temp_size_in_bytes

    def seconds(self, steps=1):
        start = time.perf_counter()
        for _ in range(steps):
            *self.state, value = self.executable(*self.state, *self.batch)
        jax.block_until_ready(value)
        return time.perf_counter() - start


def measure(name, repeats):
    model, shape = PROBLEMS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    y = jax.random.randint(jax.random.key(1), shape[:1], 0, 10)
    params = jax.jit(model.init)(jax.random.key(2), x)["params"]

    def loss_fn(params, x, y):
        scores = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    sgd = Compiled(loss_fn, optax.sgd(1e-3), params=params, batch=(x, y))
    rows = {}
    for method, tx in methods().items():
        other = Compiled(loss_fn, tx, params=params, batch=(x, y))
        steps = EVERY if "every" in method else 1
        sgd.seconds(steps), other.seconds(steps)  # the first calls are slow
        pairs = [(sgd.seconds(steps), other.seconds(steps)) for _ in range(repeats)]
        flops = other.flops / sgd.flops
        if "every" in method:  # of a conditional the compiler counts the dearer branch
            flops = 1 + (flops - 1) / EVERY
        rows[method] = {
            "flops": flops,
            "time": statistics.median(b / a for a, b in pairs),
            "sgd_ms": 1e3 * statistics.median(a for a, _ in pairs) / steps,
            "memory": other.memory / sgd.memory,
        }
        print(f"{name}, {method}: {rows[method]}", flush=True)
    return rows


def table(results):
    lines = ["| model | method | flops | time | memory | SGD, ms |", "|---|---|---|---|---|---|"]
    for name, rows in results.items():
        for method, row in rows.items():
            lines.append(
                f"| {name} | {method} | {row['flops']:.2f} | {row['time']:.2f} | "
                f"{row['memory']:.2f} | {row['sgd_ms']:.1f} |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--repeats", type=int, default=15, help="alternating pairs a ratio")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "rates.json")
    args = parser.parse_args()
    args.out.parent.mkdir(exist_ok=True)
    about = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "repeats": args.repeats,
    }
    results = {}
    for name in args.models:
        results[name] = measure(name, args.repeats)
        args.out.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
