"""What no transformation reads is not computed: counted in flops of the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr.states import update_when
from tests.signals.reference import standard_normal

N, M, H, K = 64, 48, 40, 10


def loss_fn(params, x, y):
    h = jnp.tanh(x @ params["w0"] + params["b0"][None])
    h = jnp.tanh(h @ params["w1"])
    return jnp.mean(jnp.sum((h @ params["w2"] - y) ** 2, 1))


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w0": standard_normal(keys[0], M, H),
        "b0": jnp.zeros(H),
        "w1": standard_normal(keys[1], H, H),
        "w2": standard_normal(keys[2], H, K),
    }
    return params, standard_normal(keys[3], N, M), jnp.zeros((N, K))


def flops(function, *args):
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.fixture(scope="module")
def plain(problem):
    return flops(jax.value_and_grad(loss_fn), *problem)


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("signals", [False, True])
def test_what_is_not_read_costs_nothing(problem, plain, signals, composite):
    loss = loss_fn
    if composite:

        def predict(p, x, y):
            h = jnp.tanh(x @ p["w0"] + p["b0"][None])
            return jnp.tanh(h @ p["w1"]) @ p["w2"]

        loss = optalr.composite_loss(predict, lambda z, x, y: jnp.mean(jnp.sum((z - y) ** 2, 1)))
    evaluate = optalr.value_grad_and_extras(loss)
    cost = flops(lambda *args: evaluate(*args, signals=signals)[:2], *problem)
    assert cost == pytest.approx(plain, rel=0.01)


def test_static_false_costs_the_gradient_even_if_signals_are_returned(problem, plain):
    evaluate = optalr.value_grad_and_extras(loss_fn)

    def step(*args):
        value, grads, extras = evaluate(*args, signals=False)
        return value, grads, extras["signals"]

    assert flops(step, *problem) == pytest.approx(plain, rel=0.01)


def test_a_traced_flag_costs_nothing_where_signals_are_not_read(problem, plain):
    evaluate = optalr.value_grad_and_extras(loss_fn)
    step = lambda flag, *args: evaluate(*args, signals=flag)[:2]  # noqa: E731
    assert flops(step, True, *problem) == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize(
    ("read", "floor"),
    [
        (lambda s: s["w0"].rows, 2 * N * M**2),
        (lambda s: s["w0"].cols, 2 * N * H**2),
        (lambda s: s["w2"].rows, 2 * N * H**2),
        (lambda s: s["w0"].row_mean, N * M),
        (lambda s: (s["w0"].count, s["w0"].positions), 0),
        (lambda s: s, 2 * N * (M**2 + H**2 + 2 * H**2 + H**2 + K**2)),
    ],
    ids=["input side", "output side", "another layer", "mean", "counts", "everything"],
)
def test_one_factor_costs_its_own_product_only(problem, plain, read, floor):
    evaluate = optalr.value_grad_and_extras(loss_fn)

    def step(*args):
        value, grads, extras = evaluate(*args)
        return value, grads, read(extras["signals"])

    added = flops(step, *problem) - plain
    assert floor <= added * 1.001 + 1
    assert added <= 1.05 * floor + 0.01 * plain


def test_reading_the_head_measures_the_head_only(problem, plain):
    evaluate = optalr.value_grad_and_extras(loss_fn)

    def step(*args):
        value, grads, extras = evaluate(*args)
        return value, grads, jnp.trace(extras["head"].rows)

    added = flops(step, *problem) - plain
    assert added <= 1.05 * 2 * N * H**2 + 0.01 * plain


def test_samples_cost_their_share():
    params = {"conv": jnp.ones((3, 3, 8, 16)) * 0.1}
    x = standard_normal(0, 16, 12, 12, 8)

    def conv_loss(params, x):
        h = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.sum(jnp.tanh(h), (1, 2, 3)))

    def cost(**options):
        evaluate = optalr.value_grad_and_extras(conv_loss, **options)
        step = lambda *a: (evaluate(*a)[1], evaluate(*a)[2]["signals"])  # noqa: E731
        return flops(step, params, x) - flops(jax.grad(conv_loss), params, x)

    full, sampled = cost(), cost(every=2, max_positions=18)
    assert np.isclose(full, 2 * 16 * 144 * (72**2 + 16**2), rtol=0.05)
    assert sampled < full / 12  # an eighth of the positions of half the examples, and choosing them


def narrow_problem():
    """A model with fewer examples than features: its operands are smaller than its moments."""
    params = {"w0": jnp.full((37, 29), 0.1), "w1": jnp.full((29, 10), 0.2)}

    def loss(params, x):
        return jnp.mean(jnp.sum((jnp.tanh(x @ params["w0"]) @ params["w1"]) ** 2, 1))

    return loss, params, standard_normal(1, 4, 37)


def outside_branches(function, *args):
    """Return the instructions of a compiled function that every call runs."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return text[text.index("\nENTRY") :]


def test_where_operands_are_smaller_a_consumer_measures_in_its_own_branch():
    loss, params, x = narrow_problem()
    evaluate = optalr.value_grad_and_extras(loss)

    def trace_of(extras):
        return jnp.trace(extras["measure"]()["w0"].rows)

    def inside(flag, state, params, x):
        _, grads, extras = evaluate(params, x, signals=flag)
        return grads, update_when(flag, lambda _, extras: trace_of(extras), state, extras)

    def outside(flag, state, params, x):
        _, grads, extras = evaluate(params, x, signals=flag)
        rows = extras["signals"]["w0"].rows
        return grads, update_when(flag, lambda _, rows: jnp.trace(rows), state, rows)

    args = (jnp.array(True), jnp.float32(0), params, x)
    assert "f32[37,37]" in outside_branches(outside, *args)
    assert "f32[37,37]" not in outside_branches(inside, *args)
    expected = jnp.trace(evaluate(params, x)[2]["signals"]["w0"].rows)
    np.testing.assert_allclose(jax.jit(inside)(*args)[1], expected, rtol=1e-6)
    assert jax.jit(inside)(jnp.array(False), *args[1:])[1] == 0


def test_a_phase_that_reads_no_signals_writes_none():
    loss, params, x = narrow_problem()
    evaluate = optalr.value_grad_and_extras(loss)
    tx = optalr.tso_alra(1e-2, switch_at=3)
    state = tx.init(params)

    def step(params, state, x):
        _, grads, extras = evaluate(params, x, signals=optalr.wants_signals(state))
        return tx.update(grads, state, params, **extras)

    for line in outside_branches(step, params, state, x).splitlines():
        if " conditional(" in line:
            assert "f32[37,37]" not in line.split(" conditional(")[0]
