"""The flow beside peers: python-somax and optimistix, where they are installed.

``flows.py`` runs these comparisons, with ``--peers-only`` nothing else.
"""

import importlib.metadata
import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optalr


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


def cross_entropy(z, x, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, y))


def beside_somax(counts, pairs):
    """Compare one step of damped Gauss-Newton, by conjugate gradients and by MINRES, on an MLP."""
    if importlib.util.find_spec("somax") is None:
        print("\npython-somax is not installed: skipped.")
        return
    version = importlib.metadata.version("python-somax")
    print(f"\nbeside python-somax {version}, MLP 784-256-128-10:")
    params, x, y = mlp_problem()
    loss = optalr.composite_loss(mlp, cross_entropy)
    for k in counts:
        try:
            peer = somax_step(k, params, (x, y))
            jax.block_until_ready(peer[0](params, peer[1]))
        except Exception as error:  # the peer's interface differs between its releases
            print(f"  k={k}: could not be run: {type(error).__name__}: {str(error)[:200]}")
            return
        tx = optalr.edf(0.5, num_steps=k, damping=(1.0, 0.0))
        runs = ((step_of(tx, loss, (x, y)), tx.init(params)), peer)
        times = [[seconds_of(run, params, state) for run, state in runs] for _ in range(pairs)]
        losses = [float(loss(after_ten(run, params, state), x, y)) for run, state in runs]
        own_time, peer_time = np.median(times, axis=0)
        ratio = np.median([a / b for a, b in times])
        print(
            f"  k={k}: optalr {1e3 * own_time:.1f} ms, somax {1e3 * peer_time:.1f} ms, ratio "
            f"{ratio:.2f}; loss after 10 steps {losses[0]:.4f} against {losses[1]:.4f}"
        )


def somax_step(k, params, batch):
    """Return somax's step with ``k`` steps of conjugate gradients, and its first state."""
    import somax

    method = somax.sgn_ce(
        predict_fn=lambda params, x: mlp(params, x, None),
        lam0=1.0,
        maxiter=k,
        tol=0.0,
        warm_start=False,
        record_cg_stats=False,
        learning_rate=0.5,
    )
    x, y = batch

    def step(params, state):
        return method.step(params, {"x": x, "y": y}, state, jax.random.key(0))

    return jax.jit(step), method.init(params)


def step_of(tx, loss, batch=()):
    """Return ``step(params, state)`` of a flow whose loss has ``batch`` as further arguments."""
    evaluate = optalr.value_grad_and_extras(loss)

    @jax.jit
    def step(params, state):
        _, grads, extras = evaluate(params, *batch, signals=False)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return step


def seconds_of(step, params, state):
    start = time.perf_counter()
    jax.block_until_ready(step(params, state))
    return time.perf_counter() - start


def after_ten(step, params, state):
    for _ in range(10):
        params, state, *_ = step(params, state)
    return params


def on_a_saddle(num_updates=40):
    """Run type H from beside a saddle, where the curvature along the gradient is negative."""

    def saddle(w, batch=None):
        return 0.5 * w[0] ** 2 - 0.5 * w[1] ** 2 + 0.025 * jnp.sum(w**4)

    start = jnp.array([0.1, 1.0])
    print(f"\nfrom beside a saddle, Newton steps of rate 0.5, {num_updates} updates:")
    tx = optalr.edf(0.5, curvature="hessian", num_steps=2, damping=(0.01, 0.0))
    step = step_of(tx, saddle)
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


def least_squares_problem(examples=200, hidden=20):
    """Return a tanh network's weights and its residual against the output of another one."""
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
    """Compare full-batch nonlinear least squares: loss over updates and seconds."""
    w0, residual = least_squares_problem()

    def half_square(z):
        return 0.5 * jnp.sum(z**2)

    print(f"\nfull-batch least squares, 200 examples, 120 parameters, {num_updates} updates:")
    loss = optalr.composite_loss(residual, half_square)
    for k in (5, 20, 40):
        rule = optalr.LevenbergMarquardt(initial=1e-2, grow=3.0, shrink=1 / 3)
        tx = optalr.edf(1.0, num_steps=k, damping=rule)
        step, state = step_of(tx, loss), tx.init(w0)
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

    for solver_class in (optimistix.LevenbergMarquardt, optimistix.GaussNewton):
        solver = solver_class(rtol=1e-12, atol=1e-12)

        @jax.jit
        def run(w, solver=solver):
            found = optimistix.least_squares(
                lambda w, _: residual(w), solver, w, max_steps=num_updates, throw=False
            )
            return found.value

        jax.block_until_ready(run(w0))
        start = time.perf_counter()
        w = jax.block_until_ready(run(w0))
        seconds = time.perf_counter() - start
        final = float(half_square(residual(w)))
        print(f"  optimistix {solver_class.__name__}: loss {final:.3e}, {seconds:.3f} s")
