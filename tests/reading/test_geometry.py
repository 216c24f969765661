"""The paper's claims as oracles: theorem 2, geodesics, and Fisher matrices known exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.reading.geometry import geodesic, noise_spectrum
from tests.reading.factors import BARE, moments


def power_of(matrix, power):
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return (vectors * values**power) @ vectors.T


def vec(matrix):
    return np.asarray(matrix, np.float64).T.reshape(-1)


def test_theorem_2_preconditioned_noise_is_isotropic_and_sgds_is_not():
    rng = np.random.default_rng(0)
    num_batches, b = 2000, 8
    root_a, root_b = np.diag([3.0, 1.0, 0.3]), np.diag([2.0, 0.2])
    alpha = rng.standard_normal((num_batches, b, 3)) @ root_a
    beta = rng.standard_normal((num_batches, b, 2)) @ root_b
    grads = np.einsum("kbi,kbj->kij", alpha, beta) / b  # independent: C = B ⊗ A exactly
    signals = {"w": moments(root_a @ root_a, root_b @ root_b, b)}
    tx = optalr.scale_by_kronecker(damping=1e-9, options=BARE)
    first = {"w": jnp.asarray(grads[0], jnp.float32)}
    _, state = jax.jit(lambda g, s: tx.update(g, s, signals=signals))(first, tx.init(first))
    off = jax.tree.map(jnp.zeros_like, signals)
    state = state._replace(count=jnp.int32(10**6))
    direction = jax.jit(lambda g: tx.update(g, state, signals=off)[0])

    def grad_fn(g):
        return {"w": jnp.asarray(g, jnp.float32)}

    plain = noise_spectrum(grad_fn, grads)
    whitened = noise_spectrum(grad_fn, grads, direction)
    covariance = np.kron(root_b @ root_b, root_a @ root_a)
    expected = np.sort(np.linalg.eigvalsh(covariance / b))[::-1]
    # A variance estimated from k draws is off by √(2/k) or so; products of Gaussians, by more.
    np.testing.assert_allclose(plain.eigenvalues[:6], expected, rtol=0.25)
    np.testing.assert_allclose(whitened.eigenvalues[:6], 1 / b, rtol=0.25)
    assert whitened.effective_rank > 5.5
    assert plain.effective_rank < 2


@pytest.mark.slow
def test_theorem_2_on_a_trained_model():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((512, 6)) * np.geomspace(3, 0.3, 6), jnp.float32)
    clean = np.argmax(np.asarray(x) @ rng.standard_normal((6, 3)), -1)
    noisy = np.where(rng.random(512) < 0.3, rng.integers(0, 3, 512), clean)
    y = jnp.asarray(noisy)  # label noise: gradients of single examples do not vanish
    params = {
        "first": jnp.asarray(rng.standard_normal((6, 8)) / 3, jnp.float32),
        "second": jnp.asarray(rng.standard_normal((8, 3)) / 3, jnp.float32),
    }

    def loss(p, x, y):
        logits = jnp.tanh(x @ p["first"]) @ p["second"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(p, _):
        value, grads = jax.value_and_grad(loss)(p, x, y)
        return jax.tree.map(lambda w, g: w - 0.3 * g, p, grads), value

    params, losses = jax.jit(lambda p: jax.lax.scan(step, p, length=200))(params)
    assert losses[-1] < 0.9 * losses[0]
    evaluate = optalr.value_grad_and_extras(loss)
    signals = jax.jit(lambda p: evaluate(p, x, y)[2]["signals"])(params)
    tx = optalr.scale_by_kronecker(damping=1e-6, options=BARE)
    _, state = jax.jit(lambda g, s: tx.update(g, s, signals=signals))(params, tx.init(params))
    off = jax.tree.map(jnp.zeros_like, signals)
    state = state._replace(count=jnp.int32(10**6))
    direction = jax.jit(lambda g: tx.update(g, state, signals=off)[0])
    gradient = jax.jit(lambda rows: jax.grad(loss)(params, x[rows], y[rows]))
    b = 16
    batches = [rng.integers(0, 512, b) for _ in range(400)]
    plain = noise_spectrum(gradient, batches)
    whitened = noise_spectrum(gradient, batches, direction)
    # 64 directions: the 8 that move all three logits alike have no gradient.
    assert b * np.mean(whitened.eigenvalues[:64]) == pytest.approx(1, rel=0.2)
    assert b * np.mean(plain.eigenvalues[:64]) < 0.5
    # Not isotropic: the Fisher matrix is a product only approximately. But far nearer to it.
    assert whitened.effective_rank > 3 * plain.effective_rank
    spread, before = (
        spectrum.eigenvalues[0] / spectrum.eigenvalues[32] for spectrum in (whitened, plain)
    )
    assert before > 10 * spread


def deep_linear(rng):
    params = {
        "first": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32),
        "second": jnp.asarray(rng.standard_normal((4, 2)), jnp.float32),
    }
    return params, jnp.asarray(rng.standard_normal((10, 3)), jnp.float32)


def outputs(params, x):
    return x @ params["first"] @ params["second"]


def test_a_deep_linear_net_has_exactly_this_true_fisher_matrix():
    params, x = deep_linear(np.random.default_rng(1))
    # Squared loss: the true Fisher matrix is the sum over unit output cotangents.
    caught = []
    for k in range(2):
        evaluate = optalr.value_grad_and_extras(lambda p, x, k=k: outputs(p, x)[:, k].mean())
        caught.append(evaluate(params, x)[2]["signals"])
    true = {
        name: dataclasses.replace(caught[0][name], cols=sum(c[name].cols for c in caught))
        for name in params
    }
    # The second layer's input sees all outputs alike, its cols are the identity.
    np.testing.assert_allclose(true["second"].cols, np.eye(2), atol=1e-6)
    jacobian = jax.vmap(jax.jacrev(lambda p, x: outputs(p, x[None])[0]), (None, 0))(params, x)
    grads = jax.grad(lambda p: jnp.mean((outputs(p, x) - 1) ** 2))(params)
    tx = optalr.scale_by_kronecker(damping=1e-3, options=BARE)
    updates, _ = jax.jit(lambda g, s: tx.update(g, s, signals=true))(grads, tx.init(grads))
    for name in params:
        rows = np.asarray(jacobian[name], np.float64)  # (N, outputs, m, n)
        rows = np.swapaxes(rows, -1, -2).reshape(-1, rows[0, 0].size)
        fisher = rows.T @ rows / len(x)
        factors = np.kron(true[name].cols, true[name].rows)
        np.testing.assert_allclose(factors, fisher, rtol=1e-4, atol=1e-5)
        expected = power_of(fisher + 1e-3 * np.eye(len(fisher)), -0.5) @ vec(grads[name])
        np.testing.assert_allclose(vec(updates[name]), expected, rtol=2e-3, atol=2e-3)


def test_the_empirical_fisher_matrix_is_not_a_product_there():
    params, x = deep_linear(np.random.default_rng(1))
    y = jnp.asarray(np.random.default_rng(2).standard_normal((10, 2)), jnp.float32)

    def loss(p, x, y):
        return 0.5 * jnp.mean(jnp.sum((outputs(p, x) - y) ** 2, -1))

    caught = optalr.value_grad_and_extras(loss)(params, x, y)[2]["signals"]["first"]
    each = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x[:, None], y[:, None])["first"]
    rows = np.swapaxes(np.asarray(each, np.float64), -1, -2).reshape(10, -1)
    fisher = rows.T @ rows / 10
    error = np.linalg.norm(np.kron(caught.cols, caught.rows) - fisher) / np.linalg.norm(fisher)
    assert error > 0.1


def test_the_three_structures_agree_on_one_layer_and_one_example():
    rng = np.random.default_rng(3)
    alpha, beta = rng.standard_normal(3), rng.standard_normal(2)
    g = {"w": jnp.asarray(np.outer(alpha, beta), jnp.float32)}
    signals = {"w": moments(np.outer(alpha, alpha), np.outer(beta, beta), 1)}
    arguments = {"damping": 1e-2}
    kronecker = optalr.scale_by_kronecker(options=BARE, **arguments)
    methods = [
        kronecker,
        optalr.scale_by_block_diagonal(damping_form="absolute", **arguments),
        optalr.scale_by_full_matrix(damping_form="absolute", **arguments),
        optalr.scale_by_full_matrix(damping_form="absolute", window=2, **arguments),
    ]
    fisher = np.outer(vec(g["w"]), vec(g["w"])) + 1e-2 * np.eye(6)
    expected = power_of(fisher, -0.5) @ vec(g["w"])
    for tx in methods:
        updates, _ = jax.jit(lambda g, s, tx=tx: tx.update(g, s, signals=signals))(g, tx.init(g))
        np.testing.assert_allclose(vec(updates["w"]), expected, rtol=1e-3, atol=1e-4)


def test_the_structures_agree_on_many_examples_after_the_factor_n():
    """Zero-mean gradients of all pairs of inputs and signals: C = B ⊗ A exactly, and F = C/N."""
    rng = np.random.default_rng(8)
    alpha = np.diag([2.0, 1.0, 0.7]) @ np.linalg.qr(rng.standard_normal((3, 3)))[0]
    beta = np.diag([1.5, 0.8]) @ np.linalg.qr(rng.standard_normal((2, 2)))[0]
    each = np.einsum("pi,qj->pqij", alpha, beta).reshape(6, 3, 2)
    n = len(each)
    signals = {"w": moments(alpha.T @ alpha / 3, beta.T @ beta / 2, n)}
    # Signs that are orthogonal over 8 batches: in the mean of ggᵀ no two examples meet.
    signs = np.array([[1.0]])
    for _ in range(3):
        signs = np.kron(signs, [[1, 1], [1, -1]])
    grads = np.einsum("kn,nij->kij", signs[:, :n], each) / n
    arguments = {"decay": None, "damping": 1e-6}
    methods = [
        optalr.scale_by_block_diagonal(**arguments),
        optalr.scale_by_full_matrix(**arguments),
        optalr.scale_by_full_matrix(window=8, **arguments),
    ]
    last = {"w": jnp.asarray(grads[-1], jnp.float32)}
    tx = optalr.scale_by_kronecker(damping=1e-6, options=BARE)
    kronecker = jax.jit(lambda g, s: tx.update(g, s, signals=signals))(last, tx.init(last))[0]
    rows = np.stack([vec(g) for g in each])
    expected = power_of(rows.T @ rows / n, -0.5) @ vec(last["w"])
    np.testing.assert_allclose(vec(kronecker["w"]), expected, rtol=1e-4, atol=1e-4)
    for dense in methods:
        update, state = jax.jit(dense.update), dense.init(last)
        for g in grads:
            updates, state = update({"w": jnp.asarray(g, jnp.float32)}, state)
        # AdaGrad's sum is 8 times the mean over the batches, which is C/N.
        ours = np.sqrt(8) * vec(updates["w"])
        np.testing.assert_allclose(ours, np.sqrt(n) * expected, rtol=1e-3, atol=1e-3)


def normal_metric(point):
    """The Fisher metric of N(μ, σ²) in (μ, σ)."""
    return jnp.diag(jnp.array([1.0, 2.0]) / point[1] ** 2)


def test_a_constant_metric_has_straight_geodesics():
    metric = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    curve = geodesic(lambda _: metric, jnp.array([1.0, 2.0]), jnp.array([0.5, -1.0]))
    assert float(curve.gaps.max()) < 1e-5


def test_geodesics_of_normal_distributions_are_half_ellipses_and_not_straight():
    start, velocity = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.2])
    curve = geodesic(normal_metric, start, velocity, duration=2.0, num_steps=200)
    np.testing.assert_allclose(curve.speeds, curve.speeds[0], rtol=1e-4)
    # In (μ/√2, σ) it is the Poincaré half plane: circles centred on σ = 0.
    x, y = curve.points[:, 0] / np.sqrt(2), curve.points[:, 1]
    dx, dy = velocity[0] / np.sqrt(2), velocity[1]
    centre = x[0] + y[0] * dy / dx
    np.testing.assert_allclose((x - centre) ** 2 + y**2, (x[0] - centre) ** 2 + 1, rtol=1e-4)
    assert float(curve.gaps[-1]) > 0.1
    # They part as t², so half the step has half the relative gap.
    short = geodesic(normal_metric, start, velocity, duration=0.02, num_steps=20)
    np.testing.assert_allclose(short.gaps[-1] / short.gaps[10], 2.0, rtol=0.1)


def tanh_net(point, x):
    return jnp.tanh(x @ point[:4].reshape(2, 2)) @ point[4:]


def sure_or_not(point, x):
    """The Fisher matrix of a label that is 1 with probability sigmoid(net), damped."""
    p = jax.nn.sigmoid(tanh_net(point, x))
    rows = jax.jacrev(tanh_net)(point, x)
    return rows.T @ (rows * (p * (1 - p))[:, None]) / len(x) + 1e-2 * jnp.eye(6)


def one_spread(point, x):
    """That of a linear model's output in noise of one variance, damped: the same everywhere."""
    rows = jax.jacrev(lambda w: jnp.concatenate([x, x**2, x**3], 1) @ w)(point)
    return rows.T @ rows / len(x) + 1e-2 * jnp.eye(6)


@pytest.mark.slow
def test_steps_of_a_small_net_leave_the_geodesic_as_their_length_squared():
    rng = np.random.default_rng(9)
    x = jnp.asarray(rng.standard_normal((20, 2)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 2, 20), jnp.float32)
    start = jnp.asarray(rng.standard_normal(6), jnp.float32)

    def loss(point):
        return optax.sigmoid_binary_cross_entropy(tanh_net(point, x), y).mean()

    direction = -power_of(sure_or_not(start, x), -0.5) @ np.asarray(jax.grad(loss)(start))
    direction = jnp.asarray(direction / np.linalg.norm(direction), jnp.float32)

    def distance(metric, length):
        end = geodesic(lambda p: metric(p, x), start, length * direction, num_steps=50).points[-1]
        return float(jnp.linalg.norm(end - (start + length * direction)))

    long, short = distance(sure_or_not, 0.2), distance(sure_or_not, 0.1)
    assert short > 1e-4
    # The next term of the curve is of third order.
    assert long / short == pytest.approx(4, rel=0.3)
    # Zero, up to the rounding of coordinates of order 1 over 50 steps.
    assert distance(one_spread, 0.2) < 50 * np.finfo(np.float32).eps


def test_a_geodesic_that_stays_where_it_is_has_no_gap():
    curve = geodesic(normal_metric, jnp.ones(2), jnp.zeros(2), num_steps=3)
    np.testing.assert_array_equal(curve.gaps, np.zeros(4))
    np.testing.assert_array_equal(curve.points, np.ones((4, 2)))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="batches"):
        noise_spectrum(lambda b: b, [jnp.ones(2)])
    with pytest.raises(ValueError, match="duration"):
        geodesic(normal_metric, jnp.ones(2), jnp.ones(2), duration=0.0)
    with pytest.raises(ValueError, match="num_steps"):
        geodesic(normal_metric, jnp.ones(2), jnp.ones(2), num_steps=0)
    with pytest.raises(TypeError, match=r"start must be of floating point, got int32"):
        geodesic(normal_metric, jnp.array([0, 1]), jnp.ones(2))
    with pytest.raises(TypeError, match="velocity"):
        geodesic(normal_metric, jnp.ones(2), jnp.array([0, 1]))
