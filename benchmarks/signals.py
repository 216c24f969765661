"""What capturing signals costs beside the gradient: time, flops and memory.

    python benchmarks/signals.py                       # all models, a table, and JSON into results/
    python benchmarks/signals.py --models mlp --repeats 20

Each model is timed by alternating pairs of blocks within one process, and the ratio's median is
shown: the gradient alone against the gradient with signals. Columns:

  each      signals at every step, all positions
  sampled   signals at every step, of one example in ``--every`` and ``--positions`` positions
  off       a traced flag that is off
  amortized a traced flag that is on at every 10th step, sampled likewise
  folded    as ``amortized``, but what is returned are moving averages of the moments, which take
            ``extras["measure"]()`` in a branch of their own, as ``scale_by_kronecker`` does
  floor     (gradient flops + 2NT(m² + n²) over the layers) / gradient flops, for ``each``
  memory    (peak of ``each``, less the returned matrices) / peak of the gradient

kfac-jax, where it can be imported, is timed by ``benchmarks/signals_kfac_jax.py``.
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
import jax.numpy as jnp
import optax

import optalr
from optalr.states import update_when

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


class TransformerBlock(nn.Module):
    """Pre-norm attention (4 heads) and a 4× wide MLP, width 128, and a readout a position."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        h = nn.Dense(512)(nn.LayerNorm()(x))
        return nn.Dense(10)(x + nn.Dense(128)(nn.gelu(h)))


class ResNet(nn.Module):
    """A ResNet-8: three stages 16-32-64 of one block each, group-free batch statistics."""

    @nn.compact
    def __call__(self, x):
        def norm(h):
            return nn.BatchNorm(use_running_average=False)(h)

        x = nn.relu(norm(nn.Conv(16, (3, 3), use_bias=False)(x)))
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            h = nn.relu(norm(nn.Conv(width, (3, 3), strides=stride, use_bias=False)(x)))
            h = norm(nn.Conv(width, (3, 3), use_bias=False)(h))
            if x.shape != h.shape:
                x = nn.Conv(width, (1, 1), strides=stride, use_bias=False)(x)
            x = nn.relu(x + h)
        return nn.Dense(10)(x.mean((1, 2)))


class GPT(nn.Module):
    """A causal transformer of 6 layers, width 512, 8 heads, 2048 tokens; embedding not shared."""

    @nn.compact
    def __call__(self, tokens):
        mask = nn.make_causal_mask(tokens)
        places = self.param("places", nn.initializers.normal(0.02), (tokens.shape[1], 512))
        x = nn.Embed(2048, 512)(tokens) + places[None]
        for _ in range(6):
            x = x + nn.MultiHeadDotProductAttention(num_heads=8)(nn.LayerNorm()(x), mask=mask)
            h = nn.Dense(2048)(nn.LayerNorm()(x))
            x = x + nn.Dense(512)(nn.gelu(h))
        return nn.Dense(2048)(nn.LayerNorm()(x))


def problems():
    """Name -> (model, input shape, label shape)."""
    return {
        "mlp": (MLP(), (128, 784), (128,)),
        "vgg": (VGG(), (64, 32, 32, 3), (64,)),
        "transformer": (TransformerBlock(), (32, 64, 128), (32, 64)),
        "resnet": (ResNet(), (64, 32, 32, 3), (64,)),
    }


def gpt_shapes():
    """Return loss_fn (with aux), and shapes of params and batch: a CPU takes too long to run it."""
    model = GPT()
    tokens = jax.ShapeDtypeStruct((16, 256), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def loss_fn(params, tokens, labels):
        logits = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), None

    return loss_fn, params, (tokens, tokens)


def make(name):
    """Return loss_fn (with aux), params and batch."""
    model, shape, labels = problems()[name]
    x = jax.random.normal(jax.random.key(0), shape)
    y = jax.random.randint(jax.random.key(1), labels, 0, 10)
    variables = jax.jit(model.init)(jax.random.key(2), x)
    params = variables["params"]
    stats = {k: v for k, v in variables.items() if k != "params"}

    def loss_fn(params, stats, x, y):
        logits, new = model.apply({"params": params, **stats}, x, mutable=list(stats))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

    return loss_fn, params, (stats, x, y)


def compiled(function, *args):
    """Compile; return the executable, its flops and its peak memory in bytes."""
    executable = jax.jit(function).lower(*args).compile()
    cost = executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    memory = executable.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    return executable, cost["flops"], peak


def seconds(run):
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def ratio(first, second, repeats):
    """Return the median of second's time over first's, of alternating pairs, and first's time.

    At least ``repeats`` pairs, and more of what is quick: as many as fill about three seconds.
    """
    first(), second()
    repeats = max(repeats, min(200, int(3 / (seconds(first) + seconds(second)))))
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return statistics.median(b / a for a, b in pairs), statistics.median(a for a, _ in pairs)


class Folding:
    """A compiled gradient that also keeps moving averages of the moments, updated in place."""

    def __init__(self, evaluate, params, batch):
        def step(averages, flag, params, *batch):
            value, grads, extras = evaluate(params, *batch, signals=flag)

            def fold(averages, extras):
                moments = extras["measure"]()
                return jax.tree.map(lambda a, x: 0.95 * a + 0.05 * x, averages, moments)

            return update_when(flag, fold, averages, extras), value, grads

        like = jax.eval_shape(lambda p, *b: evaluate(p, *b)[2]["signals"], params, *batch)
        self.averages = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        self.args = (params, *batch)
        jitted = jax.jit(step, donate_argnums=0)
        self.step = jitted.lower(self.averages, jnp.array(True), *self.args).compile()

    def ten_steps(self):
        for i in range(10):
            self.averages, *rest = self.step(self.averages, jnp.array(i == 0), *self.args)
        return self.averages, rest


def returning_signals(evaluate):
    def step(flag, params, *batch):
        value, grads, extras = evaluate(params, *batch, signals=flag)
        return value, grads, extras["signals"]

    return step


def always(evaluate):
    return lambda params, *batch: returning_signals(evaluate)(True, params, *batch)


def gram_flops(signals):
    """Return the flops of the Gram matrices, over all layers: 2NT(m² + n²)."""
    layers = jax.tree.leaves(signals, is_leaf=lambda m: isinstance(m, optalr.LayerMoments))
    return sum(
        2 * float(m.count * m.positions) * (m.rows.shape[-1] ** 2 + m.cols.shape[-1] ** 2)
        for m in layers
    )


def measure(name, repeats, *, every, positions):
    loss_fn, params, batch = make(name)
    full = optalr.value_grad_and_extras(loss_fn, has_aux=True)
    sampled = optalr.value_grad_and_extras(
        loss_fn, has_aux=True, every=every, max_positions=positions
    )
    plain, flops, peak = compiled(jax.value_and_grad(loss_fn, has_aux=True), params, *batch)
    each, each_flops, each_peak = compiled(always(full), params, *batch)
    some, some_flops, some_peak = compiled(always(sampled), params, *batch)
    traced, _, _ = compiled(returning_signals(sampled), jnp.array(True), params, *batch)
    fold = Folding(sampled, params, batch)
    _, static_flops, _ = compiled(
        lambda *args: returning_signals(full)(False, *args)[:2], params, *batch
    )
    returned = each(params, *batch)[2]
    matrices = sum(a.nbytes for a in jax.tree.leaves(returned))
    on, off = jnp.array(True), jnp.array(False)

    def every_tenth():
        return [traced(on if i == 0 else off, params, *batch) for i in range(10)][-1]

    def ten_gradients():
        return [plain(params, *batch) for _ in range(10)][-1]

    def one():
        return plain(params, *batch)

    each_time, gradient = ratio(one, lambda: each(params, *batch), repeats)
    return {
        "gradient_ms": 1e3 * gradient,
        "gradient_gflop": flops / 1e9,
        "each": each_time,
        "sampled": ratio(one, lambda: some(params, *batch), repeats)[0],
        "off": ratio(one, lambda: traced(off, params, *batch), repeats)[0],
        "amortized": ratio(ten_gradients, every_tenth, max(3, repeats // 3))[0],
        "folded": ratio(ten_gradients, fold.ten_steps, max(3, repeats // 3))[0],
        "flops_each": each_flops / flops,
        "flops_sampled": some_flops / flops,
        "flops_static_off": static_flops / flops,
        "floor": (flops + gram_flops(returned)) / flops,
        "memory": (each_peak - matrices) / peak,
        "memory_sampled": (some_peak - matrices) / peak,
        "matrices_mb": matrices / 1e6,
    }


def table(results):
    columns = list(next(iter(results.values())))
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.3g}" for c in columns) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(problems()))
    parser.add_argument("--repeats", type=int, default=9, help="alternating pairs a ratio")
    parser.add_argument("--every", type=int, default=2, help="one example in so many, of a sample")
    parser.add_argument("--positions", type=int, default=16, help="positions of a sample")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "signals.json")
    args = parser.parse_args()
    args.out.parent.mkdir(exist_ok=True)
    about = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "repeats": args.repeats,
        "every": args.every,
        "positions": args.positions,
    }
    results = {}
    for name in args.models:
        results[name] = measure(name, args.repeats, every=args.every, positions=args.positions)
        print(table({name: results[name]}), flush=True)
        args.out.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
