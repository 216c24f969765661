"""The learned learning rate in chains, under transformations, with real layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import optalr
from optalr import FiniteDifferences
from tests.transforms.compiling import quick_jit
from tests.transforms.learned_rate.problems import network, one_step, quadratic, traced_step

MODES = [
    {"order": 2},
    {"order": 1},
    {"order": 2, "derivatives": FiniteDifferences(step=1e-2, relative=True)},
    {"order": 1, "derivatives": "successive_gradients"},
]


def test_masked_and_partitioned_parameters_move_by_zero_in_the_probe():
    loss_fn, params, batch = network()
    evaluate = optalr.value_grad_and_extras(loss_fn)
    _, grads, extras = quick_jit(evaluate)(params, *batch)
    only_out = lambda tree: {"hidden": False, "out": True}  # noqa: E731
    masked = optax.masked(optalr.scale_by_learned_rate(0.1), only_out)
    updates, state = quick_jit(masked.update)(grads, masked.init(params), params, **extras)
    out_loss = lambda out: loss_fn({**params, "out": out}, *batch)  # noqa: E731
    _, alone = one_step(optalr.scale_by_learned_rate(0.1), out_loss, params["out"])
    np.testing.assert_allclose(state.inner_state.next_rate, alone.next_rate, rtol=1e-5)

    labels = {"hidden": "a", "out": "b"}
    parted = optax.partition({"a": optax.sgd(0.1), "b": optalr.scale_by_learned_rate(0.1)}, labels)
    both, state = quick_jit(parted.update)(grads, parted.init(params), params, **extras)
    np.testing.assert_allclose(optalr.metrics(state)["next_rate"], alone.next_rate, rtol=1e-5)
    np.testing.assert_allclose(both["out"]["w"], updates["out"]["w"], rtol=1e-6)


@pytest.mark.parametrize("options", MODES)
def test_after_momentum_and_in_multi_steps_in_one_compilation(options):
    loss_fn, params, batch = network()
    evaluate = optalr.value_grad_and_extras(loss_fn)
    chain = optax.chain(optax.trace(0.9), optalr.scale_by_learned_rate(0.02, **options))
    tx = optax.MultiSteps(chain, 2)
    traces = []

    @quick_jit
    def step(params, state):
        traces.append(1)
        value, grads, extras = evaluate(params, *batch, signals=False)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert len(traces) == 1
    assert losses[-1] < 0.8 * losses[0]
    assert float(optalr.metrics(state)["learning_rate"]) != pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("options", MODES)
def test_state_keeps_shapes_and_types_and_low_precision_updates_their_dtype(options):
    loss_fn, params, batch = network(dtype=jnp.bfloat16)
    tx = optalr.scale_by_learned_rate(0.05, **options)
    state = tx.init(params)
    _, grads, extras = quick_jit(optalr.value_grad_and_extras(loss_fn))(params, *batch)
    updates, new_state = quick_jit(tx.update)(grads, state, params, **extras)
    kinds = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: (
            (jnp.shape(x), x.dtype, jax.dtypes.is_weakly_typed(x))
            if hasattr(jax.dtypes, "is_weakly_typed")
            else (jnp.shape(x), x.dtype, x.aval.weak_type)
        ),
        tree,
    )
    assert kinds(state) == kinds(new_state)
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    assert new_state.learning_rate.dtype == jnp.float32


@pytest.mark.parametrize("options", [{"order": 2}, {"order": 1}, {"every": 2}])
def test_under_scan_vmap_and_inject_hyperparams(options):
    loss, _, w = quadratic()
    plain = optalr.scale_by_learned_rate(0.01, **options)
    injected = optax.inject_hyperparams(optalr.scale_by_learned_rate)(0.01, **options)
    expected, state = w, None
    for _ in range(4):
        expected, state = one_step(plain, loss, expected, state)

    def body(carry, _):
        return traced_step(injected, loss, *carry), None

    (scanned, _), _ = jax.lax.scan(body, (w, injected.init(w)), length=4)
    np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-6)

    def run(w):
        state = plain.init(w)
        for _ in range(4):
            w, state = traced_step(plain, loss, w, state)
        return w

    np.testing.assert_allclose(jax.vmap(run)(jnp.stack([w, 2 * w]))[0], expected, rtol=1e-4)


def test_batch_norm_and_dropout_probes_share_the_key_and_write_no_statistics():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(16)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.Dense(3)(x)

    net, (x, y) = Net(), network()[2]
    variables = net.init(jax.random.key(0), x, train=False)
    stats = variables["batch_stats"]

    def loss_fn(params, stats, key, x, y):
        scores, new = net.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean(), new["batch_stats"]

    evaluate = quick_jit(optalr.value_grad_and_extras(loss_fn, has_aux=True))
    tx = optalr.learned_rate_sgd(0.05)
    params, key = variables["params"], jax.random.key(7)
    (_, new_stats), grads, extras = evaluate(params, stats, key, x, y)
    _, state = quick_jit(tx.update)(grads, tx.init(params), params, **extras)

    @quick_jit
    def reference(eta):
        def ray(eta):  # the same key at every rate
            moved = jax.tree.map(lambda w, g: w - eta * g, params, grads)
            return loss_fn(moved, stats, key, x, y)[0]

        once = loss_fn(params, stats, key, x, y)[1]
        return jax.grad(ray)(eta), jax.grad(jax.grad(ray))(eta), once

    slope, curvature, once = reference(0.05)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new_stats, once)
    report = optalr.metrics(state)
    np.testing.assert_allclose(report["ray_slope"], slope, rtol=1e-4)
    np.testing.assert_allclose(report["ray_curvature"], curvature, rtol=1e-3)


def test_unknown_extras_are_ignored_and_untouched_integer_leaves_stay():
    loss, _, w = quadratic()
    tx = optalr.scale_by_learned_rate(0.1)
    a = one_step(tx, loss, w, something_else=3)
    b = one_step(tx, loss, w)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    point = {"w": w, "steps": jnp.int32(3)}
    partial_loss = Partial(lambda p: loss(p["w"]) + 0 * p["steps"])
    grads = {"w": jax.grad(loss)(w), "steps": None}
    _, state = tx.update(
        grads, tx.init({"w": w}), {"w": w, "steps": None}, value_fn=partial_loss, point=point
    )
    np.testing.assert_allclose(state.next_rate, b[1].next_rate, rtol=1e-6)


def test_after_scale_by_kronecker():
    loss_fn, params, batch = network()
    evaluate = optalr.value_grad_and_extras(loss_fn)
    direction = optalr.scale_by_kronecker(damping=1e-2, update_every=5, signals_every=1)
    tx = optax.chain(direction, optalr.scale_by_learned_rate(0.02))

    @quick_jit
    def step(params, state):
        _, grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    state, start = tx.init(params), loss_fn(params, *batch)
    for _ in range(25):
        params, state = step(params, state)
    assert loss_fn(params, *batch) < 0.5 * start
    assert int(optalr.metrics(state)["failures"]) == 0


def test_the_rate_found_is_handed_to_another_optimizer():
    loss, hessian, w = quadratic()
    tx = optalr.learned_rate_then(
        optax.sgd, 0.01, optalr.switch_at(5), rate_factor=0.5, momentum=0.5
    )
    alone, state_alone, w_alone = optalr.learned_rate_sgd(0.01), None, w
    for _ in range(5):
        w_alone, state_alone = one_step(alone, loss, w_alone, state_alone)
    found = float(optalr.metrics(state_alone)["average_rate"])
    state = None
    for _ in range(8):
        w, state = one_step(tx, loss, w, state)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], 0.5 * found, rtol=1e-5)
    assert 1 / np.linalg.eigvalsh(hessian)[-1] < found < 1 / np.linalg.eigvalsh(hessian)[0]
    with pytest.raises(ValueError, match="rate_factor"):
        optalr.learned_rate_then(optax.sgd, 0.01, optalr.switch_at(5), rate_factor=0.0)
    with pytest.raises(TypeError, match="learning_rate"):
        optalr.learned_rate_then(lambda speed: optax.sgd(speed), 0.01, optalr.switch_at(5))
