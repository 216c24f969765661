"""The Lipschitz rate in training: captured moments against activations, epochs, guards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.signals.moments import LayerMoments

# The programs are small and many: compiling them is all the time that these tests take.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CLASSES = 3
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def network(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "first": {"w": jax.random.normal(keys[0], (4, 6)), "b": jnp.zeros(6)},
        "last": {"w": jax.random.normal(keys[1], (6, CLASSES)), "b": jnp.zeros(CLASSES)},
    }
    x = jax.random.normal(keys[2], (8, 4))
    return params, x, jax.random.randint(keys[3], (8,), 0, CLASSES)


def hidden(params, x):
    return jnp.tanh(x @ params["first"]["w"] + params["first"]["b"][None])


def predict(params, x, y):
    return hidden(params, x) @ params["last"]["w"] + params["last"]["b"][None]


def classify(params, x, y):
    return cross_entropy(predict(params, x, y), y).mean()


EVALUATE = jit(optalr.value_grad_and_extras(classify))


def moments(norm, size=8, dim=6):
    """Return moments of a layer whose minibatch of inputs has this Frobenius norm."""
    second = jnp.eye(dim) * (norm**2 / size / dim)
    return LayerMoments(
        rows=second,
        cols=jnp.eye(2),
        row_mean=jnp.zeros(dim),
        col_mean=None,
        count=jnp.float32(size),
        positions=jnp.float32(1),
    )


def feed(tx, norms, **extras):
    """Return the rates that a run of minibatches with these K_z gives, and the last state."""
    w = jnp.ones((6, 2))
    state, rates = tx.init(w), []
    update = jit(tx.update)
    for norm in norms:
        head = moments(jnp.float32(norm))
        _, state = update(w, state, w, head=head, **extras)
        rates.append(float(optalr.metrics(state)["learning_rate"]))
    return np.asarray(rates), state


def test_one_update_by_hand_from_captured_moments():
    params, x, y = network()
    _, grads, extras = EVALUATE(params, x, y)
    tx = optalr.lipschitz_sgd("softmax_cross_entropy", num_classes=CLASSES, weight_decay=0.1)
    updates, state = tx.update(grads, tx.init(params), params, **extras)
    K_z = np.linalg.norm(hidden(params, x))
    max_W = max(np.linalg.norm(layer["w"]) for layer in params.values())
    L = (CLASSES - 1) / (CLASSES * 8) * K_z + 0.1 * max_W
    report = optalr.metrics(state)
    np.testing.assert_allclose(report["activation_norm"], K_z, rtol=1e-5)
    np.testing.assert_allclose(report["lipschitz_constant"], L, rtol=1e-5)
    np.testing.assert_allclose(report["learning_rate"], 1 / L, rtol=1e-5)
    expected = jax.tree.map(lambda g, w: -(g + 0.1 * w) / L, grads, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, expected)
    standalone = optalr.lipschitz_rate(
        "softmax", hidden(params, x), params, num_classes=CLASSES, weight_decay=0.1
    )
    np.testing.assert_allclose(report["learning_rate"], standalone.learning_rate, rtol=1e-5)


def test_the_papers_own_numbers_in_training():
    tx = optalr.scale_by_lipschitz_rate("softmax", num_classes=10, weight_decay=1e-3)
    w = jnp.full((6, 2), 43.257 / 12**0.5)
    _, state = tx.update(w, tx.init(w), w, head=moments(206.695, size=128))
    assert round(float(state.learning_rate), 3) == 0.668


def test_binary_cross_entropy_and_least_squares():
    params, x, y = network()
    target = jnp.stack([y, y, y], axis=1).astype(jnp.float32)
    loss = optalr.composite_loss(
        predict, lambda out, x, t: 0.5 * jnp.sum((out - t) ** 2) / out.shape[0]
    )
    _, grads, extras = jit(optalr.value_grad_and_extras(loss))(params, x, target)
    norm = float(jnp.linalg.norm(target))
    tx = optalr.lipschitz_sgd("least_squares", target_norm=norm)
    _, state = jit(tx.update)(grads, tx.init(params), params, **extras)
    K_z, K_a = np.linalg.norm(hidden(params, x)), np.linalg.norm(predict(params, x, y))
    expected = 8 / ((K_a + norm) * K_z)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], expected, rtol=1e-5)
    late = optalr.lipschitz_sgd("least_squares")
    _, state = jit(late.update)(grads, late.init(params), params, **extras, target_norm=norm)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], expected, rtol=1e-5)
    with pytest.raises(TypeError, match="target_norm"):
        late.update(grads, late.init(params), params, **extras)
    with pytest.raises(TypeError, match=r"outputs.*composite_loss"):
        late.update(grads, late.init(params), params, head=extras["head"], target_norm=1.0)

    rates, _ = feed(optalr.scale_by_lipschitz_rate("binary_cross_entropy"), [4.0])
    np.testing.assert_allclose(rates, 2 * 8 / 4.0)


def test_an_input_on_the_other_side_and_many_positions():
    across = LayerMoments(
        rows=jnp.eye(2),
        cols=jnp.eye(3),
        row_mean=None,
        col_mean=jnp.zeros(3),
        count=jnp.float32(4),
        positions=jnp.float32(5),
    )
    w = jnp.ones((2, 3))
    tx = optalr.scale_by_lipschitz_rate("sigmoid")
    _, state = tx.update(w, tx.init(w), w, head=across)
    np.testing.assert_allclose(state.activation_norm, 60**0.5, rtol=1e-6)  # NT tr(A) = 4·5·3
    np.testing.assert_allclose(state.learning_rate, 2 * 20 / 60**0.5, rtol=1e-6)


def test_a_named_last_layer():
    params, x, y = network()
    _, grads, extras = EVALUATE(params, x, y)
    tx = optalr.scale_by_lipschitz_rate("softmax", num_classes=CLASSES, last_layer="['first']['w']")
    _, state = tx.update(grads, tx.init(params), params, **extras)
    np.testing.assert_allclose(state.activation_norm, np.linalg.norm(x), rtol=1e-5)
    wrong = optalr.scale_by_lipschitz_rate("softmax", num_classes=CLASSES, last_layer="first")
    with pytest.raises(ValueError, match=r"last_layer.*\['first'\]\['w'\]"):
        wrong.update(grads, tx.init(params), params, **extras)


def test_a_rate_an_epoch_takes_the_largest_of_the_epoch_that_ended():
    tx = optalr.scale_by_lipschitz_rate("sigmoid", steps_per_epoch=3)
    norms = [1.0, 4.0, 2.0, 8.0, 3.0, 3.0, 5.0, 1.0]
    in_force = [1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 8.0, 8.0]  # the first epoch follows the maximum
    rates, state = feed(tx, norms)
    np.testing.assert_allclose(rates, 16 / np.asarray(in_force), rtol=1e-6)
    assert float(state.activation_norm) == 5.0


def test_each_step_has_its_own_rate_and_no_signals_hold_it():
    tx = optalr.scale_by_lipschitz_rate("sigmoid")
    rates, state = feed(tx, [1.0, 4.0, 2.0])
    np.testing.assert_allclose(rates, [16, 4, 8], rtol=1e-6)
    assert bool(optalr.wants_signals(state))
    params, x, y = network()
    w = jnp.ones((6, 2))
    off = jax.tree.map(jnp.zeros_like, moments(jnp.float32(3.0)))
    _, state = tx.update(w, state, w, head=off)
    np.testing.assert_allclose(state.learning_rate, 8, rtol=1e-6)
    assert int(state.failures) == 0
    evaluate = jit(optalr.value_grad_and_extras(classify))
    _, grads, extras = evaluate(params, x, y, signals=jnp.zeros((), bool))
    tx = optalr.lipschitz_sgd("softmax", num_classes=3, guards={"warmup_rate": 0.25})
    _, state = tx.update(grads, tx.init(params), params, **extras)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], 0.25)


def test_momentum_averages_the_constant():
    tx = optalr.scale_by_lipschitz_rate("sigmoid", averages=(0.5,))
    rates, _ = feed(tx, [4.0, 4.0, 8.0])
    K, expected = 0.0, []
    for L in (0.25, 0.25, 0.5):
        K = 0.5 * K + 0.5 * L
        expected.append(1 / K)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    # With v ← βv + (1−β)g of a constant gradient, the step is g / L from the first on.
    recipe = optalr.lipschitz_sgd("sigmoid", momentum=0.5)
    w = jnp.ones((6, 2))
    state = recipe.init(w)
    for _ in range(3):
        updates, state = recipe.update(w, state, w, head=moments(4.0))
        np.testing.assert_allclose(updates, -4 * w, rtol=1e-6)


def test_adam_divides_the_root_of_the_average_of_squares():
    norms, dim, c = [4.0, 6.0], 6, 1 / 16
    tx = optalr.scale_by_lipschitz_rate("sigmoid", averages=(0.9, 0.99), weight_decay=0.1)
    rates, _ = feed(tx, norms)
    K1 = K2 = 0.0
    max_W = 12**0.5
    for t, norm in enumerate(norms, start=1):
        quads = np.sqrt(8 * dim * (norm**2 / 8 / dim) ** 2)  # √(N Σ_j A_jj²)
        K1 = 0.9 * K1 + 0.1 * (c * norm + 0.1 * max_W)
        K2 = 0.99 * K2 + 0.01 * (c**2 * quads + 2 * 0.1 * max_W * c * norm)
        expected = np.sqrt(K2 / (1 - 0.99**t)) / (K1 / (1 - 0.9**t))
        np.testing.assert_allclose(rates[t - 1], expected, rtol=1e-5)
    params, x, y = network()
    _, grads, extras = EVALUATE(params, x, y)
    given = optalr.scale_by_lipschitz_rate("softmax", num_classes=3, averages=(0.9, 0.999))
    a = hidden(params, x)
    _, exact = given.update(grads, given.init(params), params, **extras, activations=a)
    _, bound = given.update(grads, given.init(params), params, **extras)
    c = 2 / (3 * 8)
    expected = np.sqrt(c**2 * np.linalg.norm(a * a)) / (c * np.linalg.norm(a))
    np.testing.assert_allclose(exact.learning_rate, expected, rtol=1e-4)
    assert 0.5 * expected < float(bound.learning_rate) <= expected * 1.0001


def test_guards_bound_the_rate_and_are_counted():
    tx = optalr.scale_by_lipschitz_rate(
        "sigmoid", guards={"min_rate": 0.1, "max_rate": 10.0, "warmup_steps": 1}
    )
    rates, state = feed(tx, [4.0, 1e-6, 1e6, 4.0])
    np.testing.assert_allclose(rates, [0.1, 10.0, 0.1, 4.0], rtol=1e-6)
    assert int(optalr.metrics(state)["guarded_rates"]) == 3
    plain, _ = feed(optalr.scale_by_lipschitz_rate("sigmoid"), [4.0])
    np.testing.assert_allclose(plain, 4.0)


def test_once_the_loss_has_risen_no_step_is_longer_than_one():
    w = jnp.full((6, 2), 3.0)
    length = float(jnp.linalg.norm(w))

    def rates(values, **guards):
        tx = optalr.scale_by_lipschitz_rate("sigmoid", guards=guards)
        state, found = tx.init(w), []
        for value in values:
            updates, state = tx.update(w, state, w, head=moments(4.0), value=value)
            found.append(float(state.learning_rate))
            np.testing.assert_allclose(updates, -found[-1] * w, rtol=1e-6)
        return found, int(state.guarded_rates)

    # 1/L = 4 as long as the loss stays below 1.5 times the first, then 1/|g| for good.
    found, count = rates([2.0, 2.9, 3.1, 0.5])
    np.testing.assert_allclose(found, [4.0, 4.0, 1 / length, 1 / length], rtol=1e-6)
    assert count == 2
    np.testing.assert_allclose(rates([2.0, np.nan])[0], [4.0, 1 / length], rtol=1e-6)
    np.testing.assert_allclose(rates([2.0], max_rise=0.0, max_step=3.0)[0], [3 / length], rtol=1e-6)
    # A short step is not touched.
    np.testing.assert_allclose(rates([2.0, 9.0], max_step=100.0)[0], 4.0)
    # Switched off, or where the loss is not known, it is the paper's rule.
    assert rates([2.0, 9.0], max_step=False) == ([4.0, 4.0], 0)
    plain, _ = feed(optalr.scale_by_lipschitz_rate("sigmoid"), [4.0, 4.0])
    np.testing.assert_allclose(plain, 4.0)
    paper = optalr.scale_by_lipschitz_rate("sigmoid", guards="off")
    rates, state = feed(paper, [1e-6, 1e9], value=1.0)
    np.testing.assert_allclose(rates, [16e6, 16e-9], rtol=1e-5)
    assert int(state.guarded_rates) == 0


def test_the_defaults_keep_a_deep_net_alive_at_which_the_papers_rule_breaks_down():
    keys = jax.random.split(jax.random.key(1), 6)
    sizes = [(8, 32), (32, 32), (32, 32), (32, 3)]
    params = [
        jax.random.normal(k, n) * (2 / n[0]) ** 0.5 for k, n in zip(keys, sizes, strict=False)
    ]
    x = jax.random.normal(keys[4], (64, 8))
    y = jnp.argmax(jnp.abs(x[:, :3]), axis=1)

    def loss_fn(params):
        h = x
        for w in params[:-1]:
            h = jax.nn.relu(h @ w)
        return cross_entropy(h @ params[-1], y).mean()

    evaluate = optalr.value_grad_and_extras(loss_fn)

    def train(guards):
        tx = optalr.lipschitz_sgd("softmax", num_classes=3, guards=guards)

        def body(carry, _):
            params, state = carry
            value, grads, extras = evaluate(params, signals=True)
            updates, state = tx.update(grads, state, params, **extras)
            return (optax.apply_updates(params, updates), state), value

        run = jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), length=60)[1])
        return run(params)

    assert train("on")[-1] < 0.1
    assert not train("off")[-1] < 1.0  # log 3 is 1.099: dead


def test_zero_and_infinite_activations_leave_the_last_rate_in_place():
    rates, state = feed(optalr.scale_by_lipschitz_rate("sigmoid"), [4.0, 0.0, np.inf, np.nan])
    np.testing.assert_allclose(rates, 4.0)
    assert int(state.failures) == 3
    rates, state = feed(optalr.scale_by_lipschitz_rate("sigmoid"), [0.0])
    np.testing.assert_allclose(rates, 0.01)  # nothing measured yet: the warm-up rate


def test_a_direction_that_is_not_finite_gives_a_zero_update():
    tx = optalr.scale_by_lipschitz_rate("sigmoid")
    w = jnp.ones((6, 2))
    updates, state = tx.update(w * jnp.nan, tx.init(w), w, head=moments(4.0))
    np.testing.assert_array_equal(updates, jnp.zeros_like(w))
    assert int(state.failures) == 1


@pytest.mark.parametrize("make", [optalr.lipschitz_sgd, optalr.lipschitz_adam])
def test_trains_with_batch_norm_and_dropout(make):
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
            return nn.Dense(3)(nn.Dropout(0.25, deterministic=not train)(x))

    _, x, y = network()
    net = Net()
    variables = net.init(jax.random.key(0), x, train=False)

    def loss_fn(params, stats, key, x, y):
        given = {"params": params, "batch_stats": stats}
        scores, new = net.apply(
            given, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return cross_entropy(scores, y).mean(), new["batch_stats"]

    evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=True)
    guards = {"max_rate": 1.0} if make is optalr.lipschitz_sgd else {"max_rate": 0.1}
    tx = make("softmax", num_classes=3, steps_per_epoch=4, guards=guards)

    @jit
    def step(params, stats, state, key):
        wish = optalr.wants_signals(state)
        (value, stats), grads, extras = evaluate(params, stats, key, x, y, signals=wish)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), stats, state, value

    params, stats = variables["params"], variables["batch_stats"]
    state, losses = tx.init(params), []
    for i in range(25):
        params, stats, state, value = step(params, stats, state, jax.random.key(i))
        losses.append(float(value))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"loss": "hinge"}, "loss"),
        ({"loss": "softmax"}, "num_classes"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
        ({"averages": (1.0,)}, "averages"),
        ({"averages": (0.9, 0.9, 0.9)}, "averages"),
        ({"guards": {"min_rate": 2.0, "max_rate": 1.0}}, "max_rate"),
        ({"guards": {"warmup_rate": 0.0}}, "warmup_rate"),
        ({"guards": {"warmup_steps": -1}}, "warmup_steps"),
        ({"guards": {"max_step": 0.0}}, "max_step"),
        ({"guards": {"max_rise": -1.0}}, "max_rise"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        optalr.scale_by_lipschitz_rate(**{"loss": "sigmoid", **options})


def test_guards_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="guards"):
        optalr.scale_by_lipschitz_rate("sigmoid", guards="some")


def test_missing_extras_say_the_remedy():
    w = jnp.ones((6, 2))
    tx = optalr.scale_by_lipschitz_rate("sigmoid", weight_decay=0.1)
    with pytest.raises(TypeError, match=r"head.*value_grad_and_extras"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(TypeError, match="params"):
        tx.update(w, tx.init(w), head=moments(1.0))
