"""The Krylov flow against dense solves, its dampings, and what it composes with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

import optalr
from optalr.transforms.krylov_flow.damping import LevenbergMarquardt
from optalr.transforms.krylov_flow.transform import scale_by_krylov_flow


def predict(params, x, y):
    hidden = jnp.tanh(x @ params["w1"])
    return hidden @ params["w2"] + params["b"][None]


def softmax_loss(z, x, y):
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(z), axis=-1))


LOSS = optalr.composite_loss(predict, softmax_loss)
EVALUATE = optalr.value_grad_and_extras(LOSS)
evaluate_jitted = jax.jit(EVALUATE, static_argnames="signals")


def make_params(seed=0):
    k1, k2 = jax.random.split(jax.random.key(seed))
    return {
        "b": jnp.zeros(3),
        "w1": jax.random.normal(k1, (4, 5)) / 2,
        "w2": jax.random.normal(k2, (5, 3)),
    }


def make_batch(seed=1, n=12):
    kx, ky = jax.random.split(jax.random.key(seed))
    return jax.random.normal(kx, (n, 4)), jax.nn.softmax(3 * jax.random.normal(ky, (n, 3)))


@functools.lru_cache
def dense(curvature):
    """Gradient and dense matrix in float64, through float64 parameters."""
    params, batch = jax.tree.map(lambda p: np.asarray(p, np.float64), (make_params(), make_batch()))
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(params)
        gradient = jax.grad(lambda w: LOSS(unravel(w), *batch))(flat)
        if curvature == "hessian":
            matrix = jax.jit(jax.hessian(lambda w: LOSS(unravel(w), *batch)))(flat)
        else:
            z = predict(params, *batch)
            J = jax.jit(jax.jacobian(lambda w: predict(unravel(w), *batch).ravel()))(flat)
            H_L = jax.jit(jax.hessian(lambda z: softmax_loss(z.reshape(12, 3), *batch)))(z.ravel())
            matrix = J.T @ H_L @ J
        return np.asarray(gradient), np.asarray(matrix)


def direction_of(tx, params=None, batch=None, **more):
    params = make_params() if params is None else params
    batch = make_batch() if batch is None else batch

    @jax.jit
    def run(params, state):
        _, grads, extras = EVALUATE(params, *batch)
        return tx.update(grads, state, params, **{**extras, **more})

    return run(params, tx.init(params))


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("damping", [(0.0, 1.0), (1.0, 1.0), (0.3, 0.0)])
def test_direction_is_scipys_minres_of_the_dense_matrix(curvature, num_steps, damping):
    gradient, matrix = dense(curvature)
    shift = damping[0] * np.linalg.norm(gradient) ** damping[1]
    expected = scipy.sparse.linalg.minres(
        matrix, gradient, shift=-shift, rtol=0.0, maxiter=num_steps
    )[0]
    tx = scale_by_krylov_flow(
        curvature=curvature, num_steps=num_steps, damping=damping, negative_curvature="keep"
    )
    direction, state = direction_of(tx)
    np.testing.assert_allclose(ravel_pytree(direction)[0], expected, rtol=1e-3, atol=1e-4)
    residual = gradient - matrix @ expected - shift * expected
    np.testing.assert_allclose(state.damping, shift, rtol=1e-5)
    np.testing.assert_allclose(
        state.krylov_residual, np.linalg.norm(residual) / np.linalg.norm(gradient), rtol=1e-3
    )


def test_one_step_is_algorithm_2_by_hand():
    # L = ½(w₁² + 2·w₂²) at (1, 1): g = (1, 2), G = diag(1, 2), u = (1, 4) + |g|·(1, 2).
    loss = optalr.composite_loss(lambda w: jnp.array([1.0, np.sqrt(2)]) * w, squared)
    _, grads, extras = optalr.value_grad_and_extras(loss)(jnp.ones(2))
    direction, _ = scale_by_krylov_flow().update(
        grads, scale_by_krylov_flow().init(grads), **extras
    )
    g = np.array([1.0, 2.0])
    u = np.array([1.0, 4.0]) + np.sqrt(5) * g
    np.testing.assert_allclose(direction, (g @ u) / (u @ u) * g, rtol=1e-5)


def squared(z):
    return 0.5 * jnp.sum(z**2)


def test_linear_least_squares_is_solved_in_one_step():
    X = jax.random.normal(jax.random.key(0), (20, 5))
    y = jax.random.normal(jax.random.key(1), (20,))
    loss = optalr.composite_loss(lambda w: X @ w - y, squared)
    w = jnp.ones(5)
    _, grads, extras = optalr.value_grad_and_extras(loss)(w)
    tx = optalr.edf(1.0, num_steps=5, damping=(0.0, 1.0))
    updates, _ = tx.update(grads, tx.init(w), w, **extras)
    exact = np.linalg.lstsq(np.asarray(X), np.asarray(y), rcond=None)[0]
    np.testing.assert_allclose(optax.apply_updates(w, updates), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damping", [(0.0, 1.0), (1.0, 1.0), LevenbergMarquardt()])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_zero_gradient_gives_a_zero_update(damping, num_steps):
    loss = optalr.composite_loss(lambda w: w, squared)
    w = jnp.zeros(3)
    _, grads, extras = optalr.value_grad_and_extras(loss)(w)
    tx = scale_by_krylov_flow(num_steps=num_steps, damping=damping)
    direction, state = tx.update(grads, tx.init(w), w, **extras)
    assert not np.any(direction)
    assert int(state.failures) == 0
    assert np.isfinite(state.next_damping)


def test_negative_curvature_descends_unless_the_paper_is_followed():
    # A saddle: along the gradient at (0.1, 1) the curvature is negative.
    def saddle(w):
        return 0.5 * w[0] ** 2 - 0.5 * w[1] ** 2 + 0.25 * jnp.sum(w**4) * 0.1

    evaluate = optalr.value_grad_and_extras(saddle)
    w = jnp.array([0.1, 1.0])
    _, grads, extras = evaluate(w)
    for num_steps in (1, 2):
        kwargs = {"curvature": "hessian", "num_steps": num_steps, "damping": (0.0, 1.0)}
        descend, state = scale_by_krylov_flow(**kwargs).update(
            grads, scale_by_krylov_flow(**kwargs).init(w), w, **extras
        )
        assert float(jnp.vdot(descend, grads)) > 0
        assert int(state.negative_curvature) == 1
        keep = scale_by_krylov_flow(**kwargs, negative_curvature="keep")
        assert float(jnp.vdot(keep.update(grads, keep.init(w), w, **extras)[0], grads)) < 0
    tx = optalr.edf(0.5, curvature="hessian", num_steps=2, damping=(0.01, 0.0))
    state = tx.init(w)

    @jax.jit
    def step(w, state):
        value, grads, extras = evaluate(w)
        updates, state = tx.update(grads, state, w, **extras)
        return optax.apply_updates(w, updates), state, value

    for _ in range(40):
        w, state, value = step(w, state)
    assert float(value) < -2.4  # the minima lie at w₂² = 10


def test_products_on_a_subsample_change_the_solve_only():
    x, y = make_batch()
    params = make_params()
    _, grads, extras = evaluate_jitted(params, x, y)
    sub = optalr.curvature_products(LOSS, params, x[:4], y[:4])
    tx = scale_by_krylov_flow(damping=(0.1, 0.0))
    direction, _ = tx.update(grads, tx.init(params), params, **(extras | sub))
    g, _ = ravel_pytree(grads)
    u = ravel_pytree(sub["gauss_newton"](grads))[0] + 0.1 * g
    np.testing.assert_allclose(
        ravel_pytree(direction)[0], (g @ u) / (u @ u) * g, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("wrapped", ["masked", "partition"])
def test_masked_leaves_are_held_fixed_in_the_solve(wrapped):
    gradient, matrix = dense("gauss_newton")
    free = np.r_[np.zeros(3, bool), np.ones(20, bool), np.zeros(15, bool)]
    expected = scipy.sparse.linalg.minres(
        matrix[np.ix_(free, free)], gradient[free], shift=-0.2, rtol=0.0, maxiter=3
    )[0]
    inner = scale_by_krylov_flow(num_steps=3, damping=(0.2, 0.0))
    labels = {"b": "no", "w1": "yes", "w2": "no"}
    if wrapped == "masked":
        tx = optax.masked(inner, {name: label == "yes" for name, label in labels.items()})
    else:
        tx = optax.partition({"yes": inner, "no": optax.set_to_zero()}, labels)
    direction, _ = direction_of(tx)
    np.testing.assert_allclose(direction["w1"].ravel(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("damping", [(1.0, 1.0), LevenbergMarquardt()])
@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_a_flow_without_leaves_leaves_the_rest_alone(wrap, damping):
    flow = scale_by_krylov_flow(num_steps=2, damping=damping)
    if wrap == "masked":
        tx = optax.masked(flow, dict.fromkeys(("b", "w1", "w2"), False))
    else:
        rest = {"flow": flow, "sgd": optax.sgd(0.1)}
        tx = optax.partition(rest, dict.fromkeys(("b", "w1", "w2"), "sgd"))
    direction, state = direction_of(tx)
    _, grads, _ = evaluate_jitted(make_params(), *make_batch())
    factor = 1.0 if wrap == "masked" else -0.1
    for found, grad in zip(jax.tree.leaves(direction), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(found, factor * grad, rtol=1e-5, atol=1e-7)
    metrics = optalr.metrics(state)
    assert int(metrics["failures"]) == 0
    assert float(metrics["krylov_residual"]) == 0.0
    assert float(metrics["damping"]) == (1.0 if isinstance(damping, LevenbergMarquardt) else 0.0)


@pytest.mark.parametrize("damping", [(1.0, 1.0), LevenbergMarquardt()])
def test_python_numbers_are_parameters_like_any_other(damping):
    loss = optalr.composite_loss(lambda w: jnp.stack([w["a"], 2 * w["b"]]), squared)
    found = []
    for params in ({"a": 3.0, "b": 1.0}, {"a": jnp.float32(3.0), "b": jnp.float32(1.0)}):
        _, grads, extras = optalr.value_grad_and_extras(loss)(params)
        tx = optalr.edf(0.5, num_steps=2, damping=damping, acceleration="W2")
        updates, _ = tx.update(grads, tx.init(params), params, **extras)
        found.append([float(updates["a"]), float(updates["b"])])
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_num_steps_may_be_a_numpy_integer():
    found, _ = direction_of(scale_by_krylov_flow(num_steps=np.int64(2)))
    expected, _ = direction_of(scale_by_krylov_flow(num_steps=2))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_kronecker_preconditioner_is_exact_where_fisher_is_kronecker():
    # One linear layer, squared loss with inputs and unit output curvature: G = I ⊗ A.
    x = jax.random.normal(jax.random.key(0), (64, 6)) * jnp.array([[100.0, 10, 1, 1, 0.1, 0.01]])
    y = jax.random.normal(jax.random.key(1), (64, 2))
    loss = optalr.composite_loss(
        lambda w, x, y: x @ w["w"], lambda z, x, y: 0.5 * jnp.sum((z - y) ** 2) / 64
    )
    w = {"w": jnp.zeros((6, 2))}
    _, grads, extras = optalr.value_grad_and_extras(loss)(w, x, y)
    moments = extras["signals"]["w"]
    signals = {"w": optalr.LayerMoments(**{**vars(moments), "cols": jnp.eye(2)})}
    kwargs = {"num_steps": 1, "damping": (1e-6, 0.0)}
    plain = scale_by_krylov_flow(**kwargs)
    tx = scale_by_krylov_flow(
        **kwargs, preconditioner=optalr.kronecker_preconditioner(relative_damping=0.0)
    )
    assert bool(optalr.wants_signals(tx.init(w)))
    assert not bool(optalr.wants_signals(plain.init(w)))

    def residual(direction):  # in the 2-norm for both; the states hold each in its own
        left = grads["w"] - extras["gauss_newton"](direction)["w"] - 1e-6 * direction["w"]
        return float(jnp.linalg.norm(left) / jnp.linalg.norm(grads["w"]))

    direction, _ = tx.update(grads, tx.init(w), w, **(extras | {"signals": signals}))
    preconditioned = residual(direction)
    assert preconditioned < 0.05
    direction, state = plain.update(grads, plain.init(w), w, **extras)
    assert residual(direction) > 5 * preconditioned
    np.testing.assert_allclose(residual(direction), state.krylov_residual, rtol=1e-3)


def test_kronecker_preconditioner_needs_and_survives_signals():
    tx = scale_by_krylov_flow(num_steps=3, preconditioner=optalr.kronecker_preconditioner())
    params, (x, y) = make_params(), make_batch()
    _, grads, extras = evaluate_jitted(params, x, y)
    update = jax.jit(tx.update)
    direction, state = update(grads, tx.init(params), params, **extras)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(direction))
    assert int(state.failures) == 0
    # Captured off: the identity, so the plain iterates.
    _, _, off = evaluate_jitted(params, x, y, signals=False)
    plain_tx = scale_by_krylov_flow(num_steps=3)
    plain, _ = jax.jit(plain_tx.update)(grads, state, params, **extras)
    same, _ = update(grads, tx.init(params), params, **off)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), same, plain)
    with pytest.raises(TypeError, match="signals"):
        tx.update(grads, state, params, **{k: v for k, v in extras.items() if k != "signals"})


def train(tx, steps, seed=0):
    params, batch = make_params(seed), make_batch()

    @jax.jit
    def step(params, state):
        value, grads, extras = EVALUATE(params, *batch, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return values, state


@pytest.mark.parametrize(
    "chain",
    [
        lambda flow: optax.chain(flow, optax.clip_by_global_norm(1.0), optax.scale(-0.5)),
        lambda flow: optax.chain(optax.clip_by_global_norm(5.0), flow, optax.scale(-0.5)),
        lambda flow: optax.chain(flow, optax.trace(0.5), optax.scale(-0.3)),
        lambda flow: optax.inject_hyperparams(
            optalr.two_stage, static_args=("first", "second"), hyperparam_dtype=jnp.float32
        )(
            optax.chain(flow, optalr.scale_by_recorded_rate(0.5)),
            optax.sgd(0.1),
            phase=optalr.switch_at(5),
        ),
    ],
    ids=["clipped after", "clipped before", "momentum", "two stages"],
)
def test_composes_and_descends(chain):
    values, _ = train(chain(scale_by_krylov_flow(num_steps=2, damping=(0.1, 0.0))), 10)
    assert values[-1] < values[0]
    assert all(np.isfinite(values))


def test_learned_rate_sets_the_length_of_the_flow():
    flow = scale_by_krylov_flow(num_steps=2, damping=(0.1, 0.0))
    values, _ = train(optax.chain(flow, optalr.scale_by_learned_rate(0.5)), 8)
    assert values[-1] < values[0]


def test_learned_rate_without_lag_is_an_exact_line_search_along_the_flow():
    X = jax.random.normal(jax.random.key(0), (20, 5))
    loss = optalr.composite_loss(lambda w: X @ w - 1.0, squared)
    tx = optax.chain(
        scale_by_krylov_flow(num_steps=2, damping=(1.0, 1.0)),
        optalr.scale_by_learned_rate(0.3, lag=False),
    )
    w = jnp.ones(5)
    _, grads, extras = optalr.value_grad_and_extras(loss)(w)
    updates, _ = tx.update(grads, tx.init(w), w, **extras)
    # A search is exact where the new gradient is orthogonal to the step.
    slope = float(jnp.vdot(jax.grad(loss)(w + updates), updates))
    assert abs(slope) < 1e-4 * abs(float(jnp.vdot(grads, updates)))


def test_sequence_outputs_are_solved_like_any_other():
    # Batch x time x classes, the loss a mean over positions of which some are padding.
    x, y = make_batch(n=12)
    x, y = x.reshape(3, 4, 4), y.reshape(3, 4, 3)
    mask = jnp.arange(4)[None] < jnp.array([4, 2, 3])[:, None]

    def net(params, x, y):
        return jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b"][None, None]

    def masked(z, x, y):
        return -jnp.sum(mask[..., None] * y * jax.nn.log_softmax(z)) / jnp.sum(mask)

    params = make_params()
    tx = scale_by_krylov_flow(num_steps=3, damping=(0.1, 0.0))
    sequences = optalr.value_grad_and_extras(optalr.composite_loss(net, masked))
    _, grads, extras = jax.jit(sequences)(params, x, y)
    update = jax.jit(tx.update)
    found, _ = update(grads, tx.init(params), params, **extras)
    # The same positions as nine examples of their own.
    _, grads, extras = evaluate_jitted(params, x[mask], y[mask])
    flat, _ = update(grads, tx.init(params), params, **extras)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, flat)


def test_w1_is_momentum_on_the_solved_direction():
    loss = optalr.composite_loss(lambda w: jnp.array([1.0, 2.0]) * w, squared)
    tx = optalr.edf(0.1, acceleration="W1", damping=(0.0, 1.0))
    plain = scale_by_krylov_flow(damping=(0.0, 1.0))
    w, velocity = jnp.ones(2), jnp.zeros(2)
    state = tx.init(w)
    for _ in range(3):
        _, grads, extras = optalr.value_grad_and_extras(loss)(w)
        updates, state = tx.update(grads, state, w, **extras)
        velocity = 0.9 * velocity + plain.update(grads, plain.init(w), w, **extras)[0]
        np.testing.assert_allclose(updates, -0.1 * velocity, rtol=1e-5)
        w = optax.apply_updates(w, updates)


@pytest.mark.parametrize("acceleration", [None, "W1", "W2"])
def test_recipe_falls_faster_than_gradient_descent(acceleration):
    values, state = train(optalr.edf(1.0, num_steps=3, acceleration=acceleration), 15)
    reference, _ = train(optax.sgd(0.5), 15)
    assert values[-1] < reference[-1]
    assert {"learning_rate", "damping", "failures"} <= set(optalr.metrics(state))


def test_memory_does_not_grow_with_the_krylov_steps():
    params = {"w1": jnp.ones((64, 256)), "w2": jnp.ones((256, 3)), "b": jnp.zeros(3)}
    size = sum(leaf.nbytes for leaf in params.values())
    x, y = jnp.ones((32, 64)), jnp.ones((32, 3)) / 3

    def temporary_bytes(k):
        tx = scale_by_krylov_flow(num_steps=k)

        def run(params):
            _, grads, extras = EVALUATE(params, x, y, signals=False)
            return tx.update(grads, tx.init(params), params, **extras)[0]

        compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
        return compiled.lower(params).compile().memory_analysis().temp_size_in_bytes

    # Up to some eight steps the compiler still finds more to overlap.
    assert temporary_bytes(12) <= temporary_bytes(8) + size // 4


def convolutions(jaxpr, inside=False):
    """Yield for every convolution whether it stands inside control flow."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "conv_general_dilated":
            yield inside
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                yield from convolutions(sub, inside or name in ("cond", "scan", "while"))


def test_no_convolution_stands_inside_control_flow():
    # On a CPU XLA runs gradients of convolutions ten times slower there.
    def net(w, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
        return jnp.tanh(x).reshape(2, -1)

    loss = optalr.composite_loss(net, lambda z, x: squared(z))
    w, x = jnp.ones((3, 3, 1, 2)) / 9, jnp.ones((2, 4, 4, 1))

    def step(tx):
        def run(w, state):
            _, grads, extras = optalr.value_grad_and_extras(loss)(w, x, signals=False)
            return jax.jit(tx.update)(grads, state, w, **extras)

        return list(convolutions(jax.make_jaxpr(run)(w, tx.init(w)).jaxpr))

    flow = scale_by_krylov_flow(num_steps=2)
    found = step(flow)
    assert len(found) > 2
    assert not any(found)
    assert any(step(optax.apply_if_finite(flow, 1)))  # the walk sees those that are


def test_update_dtype_follows_the_gradient():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    direction, state = direction_of(scale_by_krylov_flow(num_steps=2), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(direction)} == {jnp.dtype(jnp.bfloat16)}
    assert state.damping.dtype == jnp.float32
    exact, _ = direction_of(scale_by_krylov_flow(num_steps=2))
    d, e = ravel_pytree(direction)[0].astype(jnp.float32), ravel_pytree(exact)[0]
    assert float(jnp.linalg.norm(d - e) / jnp.linalg.norm(e)) < 0.1


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"curvature": "fisher"}, ValueError, "curvature"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_steps": 2.0}, TypeError, "num_steps"),
        ({"num_steps": True}, TypeError, "num_steps"),
        ({"damping": (1.0, lambda count: 1.0)}, TypeError, r"damping\[1\]"),
        ({"tol": lambda count: 0.1}, TypeError, "tol"),
        ({"damping": (-1.0, 1.0)}, ValueError, r"damping\[0\]"),
        ({"damping": (1.0, float("nan"))}, ValueError, r"damping\[1\]"),
        ({"damping": 0.1}, TypeError, "damping.*pair"),
        ({"damping": LevenbergMarquardt(initial=0.0)}, ValueError, "damping.initial"),
        ({"damping": LevenbergMarquardt(grow=1.0)}, ValueError, "damping.grow"),
        ({"damping": LevenbergMarquardt(low=0.9)}, ValueError, "damping.low"),
        ({"tol": 1.0}, ValueError, "tol"),
        ({"negative_curvature": "flip"}, ValueError, "negative_curvature"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, match):
    with pytest.raises(error, match=match):
        scale_by_krylov_flow(**kwargs)


def test_bad_recipe_arguments_are_named():
    with pytest.raises(ValueError, match="acceleration"):
        optalr.edf(0.1, acceleration="W3")
    with pytest.raises(ValueError, match="learning_rate"):
        optalr.edf(-0.1)


def test_missing_extras_are_named_with_the_remedy():
    tx = scale_by_krylov_flow()
    grads = jnp.ones(2)
    with pytest.raises(TypeError, match=r"gauss_newton.*composite_loss"):
        tx.update(grads, tx.init(grads))
    tx = scale_by_krylov_flow(curvature="hessian", damping=LevenbergMarquardt())
    with pytest.raises(TypeError, match=r"'value'.*value_grad_and_extras"):
        tx.update(grads, tx.init(grads), hessian=lambda v: v)
    injected = optax.inject_hyperparams(optalr.edf)(0.1)
    with pytest.raises(TypeError, match=r"num_steps.*static_args"):
        jax.jit(injected.init)(grads)
