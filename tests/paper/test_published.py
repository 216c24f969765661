"""Whole training runs of ``optalr.paper`` against float64 NumPy, which shares no code with it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from tests.paper import numpy_net as net
from tests.paper import numpy_papers as papers

BATCHES = net.batches()
NUM_STEPS = 5 * len(BATCHES)
# Numbers that float32 holds exactly: rates are recorded in float32, whatever the parameters are.
RATE = 0.015625


def predict(w, x, y):
    return jnp.tanh(x @ w["W1"] + w["b1"][None]) @ w["W2"] + w["b2"][None]


def linear(w, x, y):
    return x @ w["W"] + w["b"][None]


def cross_entropy(logits, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def cycled(num_steps=NUM_STEPS):
    return itertools.islice(itertools.cycle(BATCHES), num_steps)


def train(tx, num_steps=NUM_STEPS, model=predict, first=None):
    """Return the weights after a run, the rates that it applied, and the last state."""
    evaluate = optalr.value_grad_and_extras(optalr.composite_loss(model, cross_entropy))

    @jax.jit
    def step(w, state, x, y):
        _, grads, extras = evaluate(w, x, y, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, w, **extras)
        rate = optalr.metrics(state).get("learning_rate", 0.0)
        return optax.apply_updates(w, updates), state, rate

    w = jax.tree.map(jnp.asarray, net.start() if first is None else first)
    state, rates = tx.init(w), []
    for x, y in cycled(num_steps):
        w, state, rate = step(w, state, x, y)
        rates.append(float(rate))
    return w, rates, state


def assert_same(found, expected, rtol=1e-9, first=None):
    """Compare weights, and make sure that the run has moved them."""
    first = net.start() if first is None else first
    for name, value in expected.items():
        assert found[name].dtype == np.float64
        moved = np.abs(value - first[name]).max()
        assert moved > 1e-3
        np.testing.assert_allclose(found[name], value, rtol=0, atol=rtol * moved)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("switch", "interval"), [slow(None, 7), (30, 7), slow(30, 1)])
def test_tso_alra(x64, switch, interval):
    tx = optalr.paper.tso_alra(
        RATE, update_every=interval, decay=0.9, damping=1e-6, switch_at=switch
    )
    expected = papers.tso_alra(
        net.start(), cycled(), eta=RATE, interval=interval, gamma=1 - 0.9, eps=1e-6,
        switch=NUM_STEPS if switch is None else switch,
    )  # fmt: skip
    assert_same(train(tx)[0], expected, rtol=1e-7)


# On logistic regression, the paper's own second problem. A net with hidden units has spikes in its
# rates, and between two spikes a rounding grows a thousandfold.
LINEAR = {"model": linear, "first": net.linear_start()}


@pytest.mark.parametrize("beta", [0.0, slow(0.1)])
def test_learned_rate_of_second_order(x64, beta):
    tx = optalr.paper.learned_rate_sgd(RATE, step=1e-5, smoothing=1e-6, rate_momentum=beta)
    found, rates, _ = train(tx, **LINEAR)
    expected, wanted = papers.learned_rate(
        net.linear_start(), cycled(), eta=RATE, eps=1e-5, delta=1e-6, beta=beta
    )
    # D holds a rounding of f, 1e-16, over 4ε²f'' = 4e-10: rates agree to some 1e-5.
    np.testing.assert_allclose(rates, wanted, rtol=1e-3)
    assert_same(found, expected, rtol=1e-3, first=net.linear_start())


def test_learned_rate_of_first_order(x64):
    tx = optalr.paper.learned_rate_sgd(RATE, order=1, meta_rate=0.5)
    found, rates, _ = train(tx, **LINEAR)
    expected, wanted = papers.learned_rate_first_order(
        net.linear_start(), cycled(), eta=RATE, alpha=0.5, delta=1e-6
    )
    np.testing.assert_allclose(rates, wanted, rtol=1e-5)  # rates in float32
    assert_same(found, expected, rtol=1e-5, first=net.linear_start())


@pytest.mark.parametrize("adaptive", [True, slow(False)])
def test_lipschitz_rate(x64, adaptive):
    num, num_epochs = len(BATCHES), 3
    tx = optalr.paper.lipschitz_sgd(
        "softmax", num_classes=10, steps_per_epoch=num, weight_decay=1e-3, every_epoch=adaptive
    )
    passes = 2 * num_epochs if adaptive else 1 + num_epochs
    found, rates, _ = train(tx, passes * num)
    expected, wanted = papers.lipschitz(
        net.start(), [BATCHES] * num_epochs, decay=1e-3, adaptive=adaptive
    )
    applied = [rate for rate in rates if rate > 0]
    assert len(applied) == num_epochs * num
    np.testing.assert_allclose(applied, np.repeat(wanted, num), rtol=1e-12)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("k", "curvature", "acceleration", "damping"),
    [
        slow(1, "gauss_newton", None, (1.0, 1.0)),
        (3, "gauss_newton", None, (1.0, 1.0)),
        slow(2, "gauss_newton", "W1", (0.5, 2.0)),
        slow(2, "gauss_newton", "W2", (0.0, 1.0)),
        slow(2, "hessian", None, (1.0, 1.0)),
    ],
)
def test_edf(x64, k, curvature, acceleration, damping):
    eta = 0.0625 if acceleration == "W1" else 0.25
    tx = optalr.paper.edf(
        eta, curvature=curvature, num_steps=k, damping=damping, acceleration=acceleration
    )
    kind = {"gauss_newton": net.gauss_newton, "hessian": net.hessian}[curvature]
    a, b = damping
    expected = papers.edf(
        net.start(), cycled(), eta=eta, k=k, a=a, b=b, kind=kind, acceleration=acceleration
    )
    assert_same(train(tx)[0], expected, rtol=1e-8)


@pytest.mark.parametrize("eps", [slow(1e-9), 1e-2])
def test_swats(x64, eps):
    tx = optalr.paper.swats(RATE, b1=0.9, b2=0.99, eps=eps)
    found, _, state = train(tx)
    expected, switched, rate = papers.swats(
        net.start(), cycled(), alpha=RATE, beta1=0.9, beta2=0.99, eps=eps
    )
    assert (switched is None) == (eps == 1e-9)
    report = optalr.metrics(state)
    assert float(report["phase"]) == (switched is not None)
    if switched is not None:
        assert int(report["steps_since_switch"]) == NUM_STEPS - switched
        np.testing.assert_allclose(report["learning_rate"], rate, rtol=1e-6)
    assert_same(found, expected)


def test_amsgrad(x64):
    found, _, _ = train(optalr.paper.amsgrad(RATE))
    expected = papers.amsgrad(net.start(), cycled(), alpha=RATE, beta1=0.9, beta2=0.999)
    assert_same(found, expected)
    blank = np.all([np.all(x == 0, 0) for x, _ in BATCHES], 0)
    assert blank.any()  # pixels whose weights have no gradient: 0/0 in the paper
    np.testing.assert_array_equal(found["W1"][blank], net.start()["W1"][blank])
