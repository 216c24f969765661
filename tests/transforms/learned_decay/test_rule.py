"""The learned decay's rule: by hand, by finite differences, its bounds, and probes that fail."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import optalr

W = jnp.array([[1.0, 2.0], [0.5, -1.0]])
PULL = jnp.array([[1.0, 0.0], [2.0, 1.0]])  # ⟨PULL, W⟩ = 1: less decay raises the loss


def pulled(params, a):
    return jnp.sum(a * params["w"])


def quadratic(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] + params["b"][None] - y) ** 2)


def quadratic_problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w": jax.random.normal(keys[0], (3, 4), dtype),
        "v": jax.random.normal(keys[1], (4, 2), dtype),
        "b": jnp.ones(2, dtype),
    }
    batch = jax.random.normal(keys[2], (5, 3), dtype), jax.random.normal(keys[3], (5, 2), dtype)
    return params, batch


def probes(tx, values, params=None, value_fn=pulled):
    """Return the states after probing one loss after another, without a step between."""
    params = {"w": W} if params is None else params
    zeros, state, states = jax.tree.map(jnp.zeros_like, params), tx.init(params), []
    update = jax.jit(tx.update)
    for value in values:
        _, state = update(zeros, state, params, validation_value_fn=Partial(value_fn, a=value))
        states.append(state)
    return states


def test_by_hand_on_2_by_2():
    tx = optalr.add_learned_decay(0.1, meta_rate=0.5, smoothing=0.5, memory=0.75)
    params = {"w": W, "b": jnp.ones(2)}
    state, grads = tx.init(params), {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    first, state = tx.update(grads, state, params, validation_value_fn=Partial(pulled, a=PULL))
    # s = −1, so m̂/√v̂ = −1 and z = 0.5.
    np.testing.assert_allclose(first["w"], 1 + 0.1 * np.exp(0.5) * np.asarray(W), rtol=1e-6)
    np.testing.assert_array_equal(first["b"], 1)
    np.testing.assert_allclose(state.weight_decay, 0.1 * np.exp(0.5), rtol=1e-6)
    assert float(state.hypergradient) == -1
    second, state = tx.update(grads, state, params, validation_value_fn=Partial(pulled, a=3 * PULL))
    # s = −3: m = 0.5 (−0.5) + 0.5 (−3), v = 0.75 · 0.25 + 0.25 · 9.
    trend = -1.75 / 0.75 / np.sqrt((0.1875 + 2.25) / (1 - 0.75**2))
    decay = 0.1 * np.exp(0.5 - 0.5 * trend)
    np.testing.assert_allclose(state.hypergradient, trend, rtol=1e-6)
    np.testing.assert_allclose(second["w"], 1 + decay * np.asarray(W), rtol=1e-6)
    assert (int(state.count), int(state.probes), int(state.failures)) == (2, 2, 0)


@pytest.mark.parametrize("per_leaf", [False, True])
def test_the_slope_is_what_a_step_of_another_decay_changes(per_leaf):
    """Dense reference: the validation loss after one step, differenced in λ, over the rate."""
    with jax.enable_x64(True):
        params, batch = quadratic_problem(jnp.float64)
        direction, rate = jax.tree.map(jnp.cos, params), 1e-5
        held_out = Partial(quadratic, x=batch[0] + 1, y=batch[1])

        def after(decay_w, decay_v):
            decays = {"w": decay_w, "v": decay_v, "b": 0.0}
            return held_out(
                jax.tree.map(lambda p, u, d: p - rate * (u + d * p), params, direction, decays)
            )

        by_w = (after(0.3 + 1e-2, 0.3) - after(0.3 - 1e-2, 0.3)) / 2e-2 / rate
        by_v = (after(0.3, 0.3 + 1e-2) - after(0.3, 0.3 - 1e-2)) / 2e-2 / rate
        tx = optalr.add_learned_decay(0.3, smoothing=0.5, per_leaf=per_leaf)
        _, state = tx.update(direction, tx.init(params), params, validation_value_fn=held_out)
    # The average holds half of the first slope. The differences err by the rate.
    slope = jax.tree.map(lambda m: 2 * m, state.memory.slope)
    if per_leaf:
        np.testing.assert_allclose([slope["w"], slope["v"]], [by_w, by_v], rtol=1e-3)
        assert isinstance(slope["b"], optax.MaskedNode)
    else:
        np.testing.assert_allclose(slope, by_w + by_v, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e3, 1e12])
def test_the_scale_of_the_loss_does_not_matter(scale):
    values = jax.random.normal(jax.random.key(3), (30, 2, 2))
    tx = optalr.add_learned_decay(0.1)
    plain, scaled = probes(tx, values), probes(tx, scale * values)
    np.testing.assert_allclose(
        [s.weight_decay for s in scaled], [s.weight_decay for s in plain], rtol=1e-4
    )


def test_the_decay_moves_by_no_more_than_its_rate_and_stays_between_its_bounds():
    values = [*([PULL] * 30), *([-PULL] * 90), *([1e6 * PULL] * 5)]
    tx = optalr.add_learned_decay(0.1, meta_rate=0.1, min_factor=0.2, max_factor=3.0)
    decays = np.array([0.1, *(s.weight_decay for s in probes(tx, values))])
    assert np.max(np.abs(np.diff(np.log(decays)))) <= 0.1 * (1 + 1e-5)
    assert decays.max() == pytest.approx(0.3, rel=1e-5)
    assert decays.min() == pytest.approx(0.02, rel=1e-5)


def test_noise_makes_shorter_steps_than_a_trend():
    noise = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (200, 1, 1)), PULL, -PULL)
    tx = optalr.add_learned_decay(0.1, meta_rate=0.01, max_factor=1e3)
    of_noise, of_trend = probes(tx, noise), probes(tx, [PULL] * 200)
    move = [abs(np.log(float(s[-1].weight_decay) / 0.1)) for s in (of_noise, of_trend)]
    assert move[1] == pytest.approx(2.0, rel=1e-3)
    assert move[0] < 0.5 * move[1]


def test_an_outlying_probe_does_not_end_the_learning():
    tx = optalr.add_learned_decay(0.1, meta_rate=0.01)
    states = probes(tx, [*([PULL] * 20), -1e8 * PULL, *([PULL] * 60)])
    # Cut to ten times the usual size, with a twentieth of its square in the mean: about six times.
    assert float(states[20].memory.slope_square) < 10 * float(states[19].memory.slope_square)
    assert float(states[-1].weight_decay) > float(states[19].weight_decay)
    assert float(states[-1].hypergradient) < -0.5
    assert int(states[-1].failures) == 0


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_probe_that_is_not_finite_is_counted_and_moves_nothing(bad, per_leaf):
    tx = optalr.add_learned_decay(0.1, per_leaf=per_leaf)
    first, before, after, last = probes(tx, [PULL, PULL, PULL.at[0, 0].set(bad), PULL])
    assert int(first.failures) == 0
    assert int(after.failures) == 1
    assert (int(after.probes), int(after.count)) == (2, 3)
    same = (before.memory, before.weight_decay, before.hypergradient)
    jax.tree.map(
        np.testing.assert_array_equal, same, (after.memory, after.weight_decay, after.hypergradient)
    )
    assert float(last.weight_decay) > float(after.weight_decay)
    assert int(last.failures) == 1


def test_zero_slopes_move_nothing():
    states = probes(optalr.add_learned_decay(0.1), [jnp.zeros((2, 2))] * 3)
    assert float(states[-1].weight_decay) == pytest.approx(0.1)
    assert float(states[-1].hypergradient) == 0
    assert int(states[-1].failures) == 0


def test_every_third_step_probes_and_moves_three_steps_worth():
    tx = optalr.add_learned_decay(0.1, meta_rate=0.01, every=3)
    logs = np.log([float(s.weight_decay) / 0.1 for s in probes(tx, [PULL] * 7)])
    np.testing.assert_allclose(logs, 0.01 * np.array([3, 3, 3, 6, 6, 6, 9]), rtol=1e-4)


def test_rates_and_initial_decays_may_be_schedules():
    tx = optalr.add_learned_decay(lambda t: 0.1 * (1 + t), meta_rate=lambda t: 0.1 * (t > 0))
    decays = [float(s.weight_decay) for s in probes(tx, [PULL] * 3)]
    np.testing.assert_allclose(decays, [0.1, 0.2 * np.exp(0.1), 0.3 * np.exp(0.2)], rtol=1e-5)


def test_leaves_learn_apart():
    params = {"up": W, "down": W, "b": jnp.ones(2)}

    def torn(params, a):
        return jnp.sum(a * params["up"]) - jnp.sum(a * params["down"])

    tx = optalr.add_learned_decay(0.1, meta_rate=0.5, per_leaf=True)
    state = probes(tx, [PULL], params, torn)[-1]
    assert float(state.memory.log_factor["up"]) == pytest.approx(0.5)
    assert float(state.memory.log_factor["down"]) == pytest.approx(-0.5)
    assert float(state.weight_decay) == pytest.approx(0.1)  # the geometric mean
    zeros = jax.tree.map(jnp.zeros_like, params)
    held_out = Partial(torn, a=jnp.zeros((2, 2)))
    updates, state = tx.update(zeros, state, params, validation_value_fn=held_out)
    decays = jax.tree.map(lambda z: 0.1 * np.exp(z), state.memory.log_factor)
    for name in ("up", "down"):
        np.testing.assert_allclose(updates[name], decays[name] * W, rtol=1e-5)
    assert not np.any(updates["b"])


def test_one_leaf_of_its_own_is_the_whole():
    values = jax.random.normal(jax.random.key(5), (20, 2, 2))
    together = probes(optalr.add_learned_decay(0.1), values)
    alone = probes(optalr.add_learned_decay(0.1, per_leaf=True), values)
    np.testing.assert_allclose(
        [s.weight_decay for s in alone], [s.weight_decay for s in together], rtol=1e-5
    )


@pytest.mark.parametrize(
    "mask",
    [
        {"a": {"w": True, "b": True}, "c": False},
        {"a": True, "c": False},
        lambda params: {"a": True, "c": False},
    ],
)
def test_a_mask_says_what_decays(mask):
    params = {"a": {"w": W, "b": jnp.ones(2)}, "c": W}
    tx = optalr.add_learned_decay(0.1, meta_rate=0.0, mask=mask)
    held_out = Partial(lambda p: jnp.sum(p["a"]["b"]) + 100 * jnp.sum(p["c"]))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, validation_value_fn=held_out)
    expected = {"a": jax.tree.map(lambda p: 0.1 * p, params["a"]), "c": zeros["c"]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
    np.testing.assert_allclose(state.memory.slope, -2 * 0.1, rtol=1e-5)  # of b alone


def test_a_loss_without_a_forward_derivative_is_probed_backward():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    custom, plain = (
        probes(
            optalr.add_learned_decay(0.1, derivative=derivative),
            [PULL],
            value_fn=lambda p, a, f=f: jnp.sum(f(a * p["w"])),
        )
        for derivative, f in (("backward", square), ("forward", jnp.square))
    )
    np.testing.assert_allclose(custom[0].memory.slope, plain[0].memory.slope, rtol=1e-6)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("initial_decay", 0.0),
        ("meta_rate", -1.0),
        ("every", 0),
        ("min_factor", 0.0),
        ("min_factor", 2.0),
        ("max_factor", 0.5),
        ("smoothing", 1.0),
        ("memory", 1.0),
        ("derivative", "sideways"),
    ],
)
def test_arguments_are_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=argument):
        optalr.add_learned_decay(**{"initial_decay": 0.1, argument: value})


def test_what_update_lacks_is_named_with_the_call_that_supplies_it():
    tx = optalr.add_learned_decay(0.1)
    state = tx.init({"w": W})
    with pytest.raises(TypeError, match="needs params: tx"):
        tx.update({"w": W}, state, validation_value_fn=Partial(pulled, a=PULL))
    call = re.escape("validation_value_fn=jax.tree_util.Partial(loss_fn, x=x, y=y)")
    with pytest.raises(TypeError, match=f"'validation_value_fn'.*{call}"):
        tx.update({"w": W}, state, {"w": W})


@pytest.mark.parametrize("per_leaf", [False, True])
def test_a_probe_that_is_not_required_may_be_missing_and_the_decay_stays(per_leaf):
    tx = optalr.add_learned_decay(0.1, required=False, per_leaf=per_leaf)
    params, zeros = {"w": W}, {"w": jnp.zeros_like(W)}
    state = probes(tx, [PULL])[-1]
    learned = float(state.weight_decay)
    assert learned != pytest.approx(0.1, rel=1e-4)
    updates, state = jax.jit(tx.update)(zeros, state, params)
    np.testing.assert_allclose(updates["w"], learned * W, rtol=1e-6)
    assert (float(state.weight_decay), int(state.probes)) == (learned, 1)
    _, state = jax.jit(tx.update)(zeros, state, params, validation_value_fn=Partial(pulled, a=PULL))
    assert int(state.probes) == 2
