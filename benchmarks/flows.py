"""What a step of the exponentially decaying flow costs, beside a gradient step and beside peers.

    python benchmarks/flows.py [--steps 1 2 5 10] [--batch 64] [--pairs 7]

Ratios are medians over alternating pairs within one process, on whatever machine this runs on;
flops and memory are the compiler's own counts. ``python-somax`` and ``optimistix`` are measured
where they are installed. Losses after the steps stand beside the times.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optalr

CHANNELS = (3, 32, 32, 64, 64, 128, 128)


def vgg_params(key):
    """Six 3×3 convolutions, a pooling after every second, two dense layers."""
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


def vgg(params, x, y, pool=pool_by_window):
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


def cross_entropy(z, x, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, y))


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


def median_ratio(step, reference, args, pairs):
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
        ratio, seconds = median_ratio(compiled, gradient, (params, x, y), pairs)
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


# Buffers are the same at every level of LLVM's optimization; compiling is faster at none.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


def cost(compiled):
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def beside_somax(counts, pairs):
    """One step of damped Gauss-Newton by conjugate gradients, and by MINRES, on one MLP."""
    if importlib.util.find_spec("somax") is None:
        print("\npython-somax is not installed: skipped.")
        return
    import somax

    print(
        f"\nbeside python-somax {importlib.metadata.version('python-somax')}, MLP 784-256-128-10:"
    )
    params, x, y = mlp_problem()

    def predict(params, x):
        return mlp(params, x, None)

    for k in counts:
        try:
            method = somax.sgn_ce(
                predict_fn=predict,
                lam0=1.0,
                maxiter=k,
                tol=0.0,
                warm_start=False,
                record_cg_stats=False,
                learning_rate=0.5,
            )
            state = method.init(params)
            batch = {"x": x, "y": y}
            peer = jax.jit(lambda p, s, m=method, b=batch: m.step(p, b, s, jax.random.key(0)))
            jax.block_until_ready(peer(params, state))
        except Exception as error:  # the peer's interface differs between its releases
            print(f"  k={k}: could not be run: {type(error).__name__}: {str(error)[:200]}")
            return
        loss = optalr.composite_loss(mlp, cross_entropy)
        tx = optalr.edf(0.5, num_steps=k, damping=(1.0, 0.0))
        own_state = tx.init(params)

        @jax.jit
        def own(p, s, loss=loss, tx=tx):
            _, grads, extras = optalr.value_grad_and_extras(loss)(p, x, y, signals=False)
            updates, s = tx.update(grads, s, p, **extras)
            return optax.apply_updates(p, updates), s

        times, losses = [], [[], []]
        for _ in range(pairs):
            pair = []
            for run, start_state in ((own, own_state), (peer, state)):
                start = time.perf_counter()
                jax.block_until_ready(run(params, start_state))
                pair.append(time.perf_counter() - start)
            times.append(pair)
        for i, (run, s) in enumerate(((own, own_state), (peer, state))):
            p = params
            for _ in range(10):
                p, s, *_ = run(p, s)
            losses[i] = float(loss(p, x, y))
        own_time, peer_time = np.median(times, axis=0)
        ratio = np.median([a / b for a, b in times])
        print(
            f"  k={k}: optalr {1e3 * own_time:.1f} ms, somax {1e3 * peer_time:.1f} ms, ratio "
            f"{ratio:.2f}; loss after 10 steps {losses[0]:.4f} against {losses[1]:.4f}"
        )


def on_a_saddle(num_updates=40):
    """Type H from beside a saddle, where the curvature along the gradient is negative."""

    def saddle(w, batch=None):
        return 0.5 * w[0] ** 2 - 0.5 * w[1] ** 2 + 0.025 * jnp.sum(w**4)

    start = jnp.array([0.1, 1.0])
    print(f"\nfrom beside a saddle, Newton steps of rate 0.5, {num_updates} updates:")
    tx = optalr.edf(0.5, curvature="hessian", num_steps=2, damping=(0.01, 0.0))
    evaluate = optalr.value_grad_and_extras(saddle)

    @jax.jit
    def step(w, state):
        _, grads, extras = evaluate(w)
        updates, state = tx.update(grads, state, w, **extras)
        return optax.apply_updates(w, updates), state

    w, state = start, tx.init(start)
    for _ in range(num_updates):
        w, state = step(w, state)
    met = int(optalr.metrics(state)["negative_curvature"])
    print(f"  edf: loss {float(saddle(w)):.4f}; met negative curvature in {met} updates")
    if importlib.util.find_spec("somax") is None:
        print("  python-somax is not installed: skipped.")
        return
    import somax

    method = somax.newton_cg(loss_fn=saddle, lam0=0.01, maxiter=2, learning_rate=0.5)
    w, state = start, method.init(start)
    for _ in range(num_updates):
        w, state, *_ = method.step(w, {"x": jnp.zeros(1)}, state, jax.random.key(0))
    print(f"  somax newton_cg: loss {float(saddle(w)):.4f}")


def mlp_problem(batch=128, sizes=(784, 256, 128, 10)):
    keys = jax.random.split(jax.random.key(0), len(sizes) + 1)
    params = [
        {"w": jax.random.normal(k, (m, n)) / np.sqrt(m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys[2:], sizes[:-1], sizes[1:], strict=True)
    ]
    x = jax.random.normal(keys[0], (batch, sizes[0]))
    return params, x, jnp.argmax(x[:, :10], axis=1)


def mlp(params, x, y):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def least_squares_problem(examples=200, hidden=20):
    """A tanh network fitted to the output of another one."""
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (examples, 5))

    def net(w, x):
        return (jnp.tanh(x @ w["a"]) @ w["b"])[:, 0]

    def make(ka, kb):
        return {
            "a": jax.random.normal(ka, (5, hidden)) / 2,
            "b": jax.random.normal(kb, (hidden, 1)) / np.sqrt(hidden),
        }

    y = net(make(keys[1], keys[2]), x)
    return make(keys[3], keys[4]), lambda w: net(w, x) - y


def beside_optimistix(num_updates=30):
    """Full-batch nonlinear least squares: loss over updates and seconds."""
    w0, residual = least_squares_problem()

    def half_square(z):
        return 0.5 * jnp.sum(z**2)

    print(f"\nfull-batch least squares, 200 examples, 120 parameters, {num_updates} updates:")
    for k in (5, 20, 40):
        rule = optalr.LevenbergMarquardt(initial=1e-2, grow=3.0, shrink=1 / 3)
        tx = optalr.edf(1.0, num_steps=k, damping=rule)
        evaluate = optalr.value_grad_and_extras(optalr.composite_loss(residual, half_square))

        @jax.jit
        def step(w, state, tx=tx, evaluate=evaluate):
            _, grads, extras = evaluate(w, signals=False)
            updates, state = tx.update(grads, state, w, **extras)
            return optax.apply_updates(w, updates), state

        state = tx.init(w0)
        jax.block_until_ready(step(w0, state))
        w, start = w0, time.perf_counter()
        for _ in range(num_updates):
            w, state = step(w, state)
        jax.block_until_ready(w)
        seconds = time.perf_counter() - start
        final = float(half_square(residual(w)))
        print(f"  edf k={k}, Levenberg-Marquardt: loss {final:.3e}, {seconds:.3f} s")
    if importlib.util.find_spec("optimistix") is None:
        print("  optimistix is not installed: skipped.")
        return
    import optimistix

    for name in ("LevenbergMarquardt", "GaussNewton"):
        solver = getattr(optimistix, name)(rtol=1e-12, atol=1e-12)
        run = jax.jit(
            lambda w, solver=solver: (
                optimistix.least_squares(
                    lambda w, _: residual(w), solver, w, max_steps=num_updates, throw=False
                ).value
            )
        )
        jax.block_until_ready(run(w0))
        start = time.perf_counter()
        w = jax.block_until_ready(run(w0))
        seconds = time.perf_counter() - start
        final = float(half_square(residual(w)))
        print(f"  optimistix {name}: loss {final:.3e}, {seconds:.3f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--peers-only", action="store_true", help="skip the VGG-like net")
    options = parser.parse_args()
    if not options.peers_only:
        cost_of_a_step(options.steps, options.batch, options.pairs)
        memory_of_a_step(options.steps, options.batch)
    beside_somax(options.steps[:2], options.pairs)
    beside_optimistix()
    on_a_saddle()


if __name__ == "__main__":
    main()
