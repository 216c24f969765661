"""What a step of the exponentially decaying flow costs, beside a gradient step and beside peers.

    python benchmarks/flows.py [--steps 1 2 5 10] [--batch 64] [--pairs 7]

Ratios are medians over alternating pairs within one process, on whatever machine this runs on;
flops and memory are the compiler's own counts. ``flow_peers.py`` has the comparisons with
``python-somax`` and ``optimistix``, where these are installed, with losses beside the times.
"""

import argparse
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flow_peers import beside_optimistix, beside_somax, cross_entropy, on_a_saddle

import optalr

CHANNELS = (3, 32, 32, 64, 64, 128, 128)


def vgg_params(key):
    """Return weights: six 3×3 convolutions, pooled after every second, and two dense layers."""
    keys = jax.random.split(key, 8)
    shapes = [(3, 3, m, n) for m, n in itertools.pairwise(CHANNELS)]
    shapes += [(4 * 4 * 128, 128), (128, 10)]
    return [
        {"w": jax.random.normal(k, s) * np.sqrt(2 / np.prod(s[:-1])), "b": jnp.zeros(s[-1])}
        for k, s in zip(keys, shapes, strict=True)
    ]


def pool_by_window(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def pool_by_reshape(x):
    """Pool as the other does; its gradient is no scatter, whose buffers XLA's CPU keeps apart."""
    n, h, w, c = x.shape
    return jnp.max(x.reshape(n, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def vgg(params, x, y, *, pool=pool_by_window):
    for i, layer in enumerate(params[:6]):
        x = jax.lax.conv_general_dilated(
            x, layer["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["b"])
        if i % 2:
            x = pool(x)
    x = x.reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params[6]["w"] + params[6]["b"])
    return x @ params[7]["w"] + params[7]["b"]


LOSS = optalr.composite_loss(vgg, cross_entropy)
RESHAPED = optalr.composite_loss(functools.partial(vgg, pool=pool_by_reshape), cross_entropy)


def gradient_step(params, x, y):
    value, grads = jax.value_and_grad(LOSS)(params, x, y)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), value


def flow_step(params, x, y, *, num_steps, curvature="gauss_newton", subsample=None, loss=LOSS):
    tx = optalr.edf(0.5, num_steps=num_steps, curvature=curvature)
    value, grads, extras = optalr.value_grad_and_extras(loss)(params, x, y, signals=False)
    if subsample:
        extras |= optalr.curvature_products(loss, params, x[:subsample], y[:subsample])
    updates, _ = tx.update(grads, tx.init(params), params, **extras)
    return optax.apply_updates(params, updates), value


def median_ratio(step, reference, args, *, pairs):
    """Return the median of time(step)/time(reference) over alternating pairs, and the seconds."""
    ratios, seconds = [], []
    for run in (step, reference):
        jax.block_until_ready(run(*args))
    for _ in range(pairs):
        times = []
        for run in (step, reference):
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
        seconds.append(times[0])
    return float(np.median(ratios)), float(np.median(seconds))


def cost_of_a_step(counts, batch, pairs):
    params = vgg_params(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))
    y = jnp.arange(batch) % 10
    variants = {f"edf k={k}": (flow_step, {"num_steps": k}, 1 + 1.5 * k) for k in counts}
    quarter = max(1, batch // 4)
    variants |= {
        f"edf k={k}, products on {quarter} examples": (
            flow_step,
            {"num_steps": k, "subsample": quarter},
            1 + 1.5 * k,
        )
        for k in counts[:2]
    }
    variants["edf k=1, Hessian"] = (flow_step, {"num_steps": 1, "curvature": "hessian"}, None)
    gradient = jax.jit(gradient_step).lower(params, x, y).compile()
    flops, bytes_ = cost(gradient)
    print(f"\nVGG-like net, batch {batch}, {jax.devices()[0].platform}: ratios to a gradient step")
    print(f"gradient step: {flops / 1e9:.2f} Gflop, {bytes_ / 2**20:.0f} MiB temporary")
    header = f"{'':44}{'time':>7}{'goal':>7}{'flops':>7}{'MiB':>7}{'seconds':>9}{'compile':>9}"
    print(header)
    for name, (step, options, goal) in variants.items():
        start = time.perf_counter()
        compiled = jax.jit(functools.partial(step, **options)).lower(params, x, y).compile()
        compile_seconds = time.perf_counter() - start
        ratio, seconds = median_ratio(compiled, gradient, (params, x, y), pairs=pairs)
        own_flops, own_bytes = cost(compiled)
        print(
            f"{name:44}{ratio:7.2f}{goal or float('nan'):7.1f}{own_flops / flops:7.2f}"
            f"{own_bytes / 2**20:7.0f}{seconds:9.3f}{compile_seconds:9.1f}"
        )


def memory_of_a_step(counts, batch):
    """Print the temporary memory over k for the two ways to write the same pooling."""
    params = vgg_params(jax.random.key(0))
    x, y = jnp.zeros((batch, 32, 32, 3)), jnp.arange(batch) % 10
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20
    print(f"\ntemporary MiB over k (parameters: {size:.1f} MiB)")
    for name, loss in (("pooling by reduce_window", LOSS), ("pooling by reshape", RESHAPED)):
        found = []
        for k in counts:
            step = functools.partial(flow_step, num_steps=k, loss=loss)
            compiled = jax.jit(step, compiler_options=UNOPTIMIZED).lower(params, x, y).compile()
            found.append(f"k={k}: {cost(compiled)[1] / 2**20:.0f}")
        print(f"  {name:28}" + ", ".join(found))


def in_control_flow(pairs):
    """Print how much longer a step takes inside ``two_stage`` than alone, with convolutions."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(3, 3, 1, 32), (3, 3, 32, 32), (3, 3, 32, 32), (32, 10)]
    params = [0.1 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    x, y = jax.random.normal(keys[0], (16, 16, 16, 1)), jnp.arange(16) % 10

    def predict(params, x, y):
        for kernel in params[:3]:
            names = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)
            x = jax.nn.relu(x)
        return x.mean((1, 2)) @ params[3]

    evaluate = optalr.value_grad_and_extras(optalr.composite_loss(predict, cross_entropy))

    def compiled(tx):
        def step(params, state, x, y):
            _, grads, extras = evaluate(params, x, y, signals=False)
            updates, state = tx.update(grads, state, params, **extras)
            return optax.apply_updates(params, updates), state

        return functools.partial(jax.jit(step), params, tx.init(params))

    alone = compiled(optalr.edf(0.5))
    inside = compiled(optalr.two_stage(optalr.edf(0.5), optax.sgd(0.1), optalr.switch_at(1000)))
    ratio, seconds = median_ratio(inside, alone, (x, y), pairs=pairs)
    print(
        f"\nedf k=1 inside two_stage: {1000 * seconds:.1f} ms a step, {ratio:.1f} times that alone"
    )


# Buffers are the same at every level of LLVM's optimization; compiling is faster at none.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


def cost(compiled):
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--peers-only", action="store_true", help="skip the VGG-like net")
    parser.add_argument("--control-flow", action="store_true", help="only the step in two_stage")
    options = parser.parse_args()
    if options.control_flow:
        in_control_flow(options.pairs)
        return
    if not options.peers_only:
        cost_of_a_step(options.steps, options.batch, options.pairs)
        memory_of_a_step(options.steps, options.batch)
    beside_somax(options.steps[:2], options.pairs)
    beside_optimistix()
    on_a_saddle()


if __name__ == "__main__":
    main()
