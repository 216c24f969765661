"""By default a measurement takes at most a quarter of the flops of the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr.linalg.blocks import Blocks
from optalr.linalg.structured import Diagonal, Full
from optalr.signals.moments import FactorStorage
from optalr.signals.tapping import budget
from tests.signals.reference import standard_normal

NUMBERS = ("NHWC", "HWIO", "NHWC")


def mlp_loss(params, x):
    return jnp.mean(jnp.sum(jnp.tanh(jnp.tanh(x @ params["w0"]) @ params["w1"]) ** 2, 1))


def conv_loss(params, x):
    h = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=NUMBERS)
    return jnp.mean(jnp.sum((jnp.tanh(h).mean((1, 2)) @ params["out"]) ** 2, 1))


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


MLP = mlp_loss, shapes(w0=(784, 512), w1=(512, 512)), shapes(x=(256, 784))["x"]
NET = conv_loss, shapes(conv=(3, 3, 64, 64), out=(64, 10)), shapes(x=(32, 32, 32, 64))["x"]


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("loss_fn", "params", "x"), [MLP, NET])
def test_a_measurement_takes_a_quarter_of_the_gradient(loss_fn, params, x):
    evaluate = optalr.value_grad_and_extras(loss_fn)
    plain = flops(jax.value_and_grad(loss_fn), params, x)
    measured = flops(lambda *args: (evaluate(*args)[:2], evaluate(*args)[2]["signals"]), params, x)
    # XLA counts what choosing a sample and laying it out take as well.
    assert measured - plain <= (0.25 + 0.02) * plain
    report = optalr.coverage(loss_fn, params, x)
    assert 0 < sum(leaf.measuring_cost for leaf in report.leaves) <= 0.25
    whole = optalr.coverage(loss_fn, params, x, max_cost=None)
    assert sum(leaf.measuring_cost for leaf in whole.leaves) > 0.25
    assert all(leaf.sampled == 1 for leaf in whole.leaves)


def test_little_is_measured_whole():
    params, x = {"conv": standard_normal(0, 3, 3, 8, 16)}, standard_normal(1, 16, 12, 12, 8)
    params["out"] = standard_normal(2, 16, 2)
    default, whole = (
        optalr.value_grad_and_extras(conv_loss, **options)(params, x)[2]["signals"]
        for options in ({}, {"max_cost": None})
    )
    np.testing.assert_array_equal(default["conv"].rows, whole["conv"].rows)
    assert default["conv"].samples == 16 * 12 * 12


def test_a_limited_sample_is_unbiased_and_says_how_large_it_is(monkeypatch):
    monkeypatch.setattr(budget, "LEAST", 0.0)
    params, x = {"w": standard_normal(0, 6, 2)}, standard_normal(1, 12, 5, 6)

    def loss_fn(params, x, scale):
        return scale * jnp.mean(jnp.sum((x @ params["w"]) ** 2, (1, 2)))

    whole = optalr.value_grad_and_extras(loss_fn, every=1)(params, x, 1.0)[2]["signals"]["w"]
    evaluate = optalr.value_grad_and_extras(loss_fn, max_cost=0.2)
    scales = jax.random.uniform(jax.random.key(3), (4000,), minval=0.5)
    many = jax.jit(jax.vmap(lambda scale: evaluate(params, x, scale)[2]["signals"]["w"]))(scales)
    # 4·60·6·2 flops of the gradient, of which a fifth pays for 7 positions of 2 (6² + 2²) each.
    assert set(np.asarray(many.samples)) == {7.0}
    assert set(np.asarray(many.count)) == {12.0}
    for got, want in ((many.rows, whole.rows), (many.row_mean, whole.row_mean)):
        values = np.asarray(got, np.float64)
        error = values.std(0) / np.sqrt(len(values))
        assert np.all(np.abs(values.mean(0) - want) <= 5 * error + 1e-5)


def test_small_factors_get_enough_and_large_ones_what_is_left():
    costs = [budget.Cost(10**6, 64, 2 * 64**2, 1), budget.Cost(10**6, 2048, 2 * 2048**2, 1)]
    enough = sum(cost.per_row * cost.enough for cost in costs)
    level = budget._affordable(costs, enough / 4)
    small, large = (cost.sample(level) for cost in costs)
    assert small == costs[0].enough == budget.ENOUGH * budget.SMALLEST
    assert 0.9 * enough / 4 <= sum(c.per_row * c.sample(level) for c in costs) <= enough / 4
    assert large < costs[1].enough
    assert [c.sample(budget._affordable(costs, enough)) for c in costs] == [c.enough for c in costs]


def test_a_method_that_keeps_less_sees_more():
    """A diagonal of 6000 entries costs no more than whole moments of a few rows."""
    params, x = shapes(w=(6000, 256)), shapes(x=(512, 6000))["x"]
    loss_fn = lambda params, x: jnp.mean(jnp.sum(jnp.tanh(x @ params["w"]) ** 2, 1))  # noqa: E731
    assert optalr.coverage(loss_fn, params, x)["['w']"].sampled == 1
    whole = FactorStorage(max_factor_size=6000, block_size=None)
    kept = optalr.coverage(loss_fn, params, x, options=whole)["['w']"]
    assert kept.sampled < 0.1
    assert kept.measuring_cost <= 0.25


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_cost_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="max_cost"):
        optalr.value_grad_and_extras(mlp_loss, max_cost=value)


def test_long_sides_are_blocked():
    storage = FactorStorage()
    assert isinstance(storage.side(1152), Full)
    assert storage.side(1153).is_like(Blocks(1153, num_blocks=2))
    assert storage.side(4096).is_like(Blocks(4096, num_blocks=4))
    assert isinstance(storage.side(4097), Diagonal)
    assert isinstance(FactorStorage(block_size=None).side(4096), Full)
    assert FactorStorage(block_size=1000).side(50_000).num_blocks == 50
