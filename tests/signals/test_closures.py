"""A loss made anew at each step: its extras cross a jit boundary without a new trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import optalr
from optalr.signals.binding.closures import take_apart

PARAMS = {"w": jnp.ones((3, 2))}
NUM_STEPS = 6
MODEL = nn.Dense(2, use_bias=False)


def loss(params, x, y, scale=1.0):
    return scale * jnp.mean((x @ params["w"] - y) ** 2)


def batch(i, size=4):
    x = jax.random.normal(jax.random.key(i), (size, 3))
    return x, jnp.full((size, 2), float(i))


def closure(x, y):
    return lambda params: loss(params, x, y)


def closure_over_numpy(x, y):
    return closure(np.asarray(x), np.asarray(y))


def closure_over_a_tree(x, y):
    data = {"x": x, "rest": (y, None)}
    return lambda params: loss(params, data["x"], data["rest"][0])


def closure_over_constants(x, y):
    scale, mode, library = 2.0, "mean", jnp
    return lambda params: scale * getattr(library, mode)((x @ params["w"] - y) ** 2)


def defaults(x, y):
    return lambda params, x=x, *, y=y: loss(params, x, y)


def nested(x, y):
    inner = closure(x, y)
    middle = lambda params: 2.0 * inner(params)  # noqa: E731
    return lambda params: middle(params) + 1.0


def partial(x, y):
    return functools.partial(loss, x=x, y=y)


def partial_of_a_closure(x, y):
    return functools.partial(lambda params, scale: scale * loss(params, x, y), scale=3.0)


def inner_function(x, y):
    def total(params):
        outputs = lambda z: z @ params["w"] - y  # noqa: E731
        return jnp.mean(outputs(x) ** 2)

    return total


def of_a_module(x, y):
    return lambda params: jnp.mean((MODEL.apply({"params": {"kernel": params["w"]}}, x) - y) ** 2)


def globals_bound_anew(x, y):
    global X, Y
    X, Y = x, y
    return lambda params: loss(params, X, Y)


def composite(x, y):
    return optalr.composite_loss(lambda p: x @ p["w"], lambda z: jnp.mean((z - y) ** 2))


class Task:
    def __init__(self, x, y):
        self.data = x, y

    def loss(self, params):
        return loss(params, *self.data)


def method(x, y):
    return Task(x, y).loss


task = Task(None, None)


def changing_object(x, y):
    task.data = x, y
    return lambda params: loss(params, *task.data)


def values_looked_at(x, y):
    rows = np.array([True, False, True, True])
    return lambda params: loss(params, x[rows], y[rows])


def counting_by_assignment(x, y):
    count = 0

    def counted(params):
        nonlocal count
        count += 1
        return loss(params, x, y)

    return counted


def traces_of(make, evaluate_with=optalr.value_grad_and_extras, **options):
    """Take steps with a loss made anew, compare every callable, return the number of traces."""
    traces = []

    @jax.jit
    def use(extras, params):
        traces.append(1)
        found = {"value": extras["value_fn"](params), "hessian": extras["hessian"](params)}
        if "gauss_newton" in extras:
            found["gauss_newton"] = extras["gauss_newton"](params)
        return found

    for i in range(NUM_STEPS):
        _, _, extras = evaluate_with(make(*batch(i)), **options)(PARAMS)
        value, expected = jax.value_and_grad(made_plain(make(*batch(i))))(PARAMS)
        _, product = jax.jvp(jax.grad(made_plain(make(*batch(i)))), (PARAMS,), (PARAMS,))
        found = use(extras, PARAMS)
        np.testing.assert_allclose(found["value"], value, rtol=1e-5)
        np.testing.assert_allclose(extras["grad"]["w"], expected["w"], rtol=1e-4, atol=1e-6)
        for curvature in set(found) - {"value"}:  # the losses are quadratic: H is G
            np.testing.assert_allclose(found[curvature]["w"], product["w"], rtol=1e-4, atol=1e-6)
    return len(traces)


def made_plain(function):
    def plain(params):
        result = function(params)
        return result[0] if isinstance(result, tuple) else result

    return plain


@pytest.mark.parametrize(
    "make",
    [closure, closure_over_numpy, closure_over_a_tree, closure_over_constants, defaults, nested,
     partial, partial_of_a_closure, inner_function, of_a_module, globals_bound_anew, composite],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_a_loss_made_anew_is_traced_once(make):
    assert traces_of(make) == 1


@pytest.mark.parametrize(
    "make",
    [method, changing_object, values_looked_at, counting_by_assignment],
    ids=lambda make: make.__name__,
)
def test_what_cannot_be_compared_is_traced_anew_and_right(make):
    assert traces_of(make) == NUM_STEPS


def test_aux_is_returned_and_the_trace_shared():
    assert traces_of(lambda x, y: lambda p: (loss(p, x, y), {"x": x}), has_aux=True) == 1
    x, y = batch(0)
    evaluate = optalr.value_grad_and_extras(lambda p: (loss(p, x, y), {"x": x}), has_aux=True)
    np.testing.assert_array_equal(evaluate(PARAMS)[0][1]["x"], x)


@pytest.mark.parametrize("kind", ["closure", "composite"])
def test_curvature_of_a_loss_made_anew(kind):
    make = globals()[kind]
    traces = []

    @jax.jit
    def use(products, params):
        traces.append(1)
        return {name: product(params) for name, product in products.items()}

    for i in range(NUM_STEPS):
        found = use(optalr.curvature_products(make(*batch(i)), PARAMS), PARAMS)
        _, product = jax.jvp(jax.grad(make(*batch(i))), (PARAMS,), (PARAMS,))
        for tree in found.values():
            np.testing.assert_allclose(tree["w"], product["w"], rtol=1e-4, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("loop", ["scan", "python"])
def test_a_full_batch_of_a_loss_made_anew(loop):
    def evaluate(scale):
        scaled = lambda p, x, y: scale * jnp.mean((x @ p["w"] - y) ** 2)  # noqa: E731
        return optalr.full_batch(scaled, chunk_size=2, loop=loop)(PARAMS, *batch(1))

    value, _, extras = evaluate(jnp.float32(3.0))
    np.testing.assert_allclose(value, 3 * loss(PARAMS, *batch(1)), rtol=1e-5)
    other = evaluate(jnp.float32(2.0))[2]
    assert jax.tree.structure(extras["value_fn"]) == jax.tree.structure(other["value_fn"])


def test_full_batch_keeps_a_loss_that_looks_at_values():
    weights = np.array([0.5, 0.0, 2.0])

    def weighted(params, x):
        return jnp.mean((x[:, weights > 0] @ params["w"][weights > 0]) ** 2)

    x = batch(0)[0]
    value, _, extras = optalr.full_batch(weighted, chunk_size=2, loop="python")(PARAMS, x)
    np.testing.assert_allclose(value, weighted(PARAMS, x), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(extras["value_fn"])(PARAMS), value, rtol=1e-5)


# What must make two functions differ, and what must not.


def same(first, second):
    (one, arrays), (other, _) = take_apart(first), take_apart(second)
    assert one.function(arrays)() is not None
    return one == other


def returning(value):
    return lambda: (value,)


@pytest.mark.parametrize(
    ("first", "second"),
    [(1, True), (1, 1.0), (0.0, -0.0), ("a", "b"), ((1, 2), (1, 3)), ({"a": 1}, {"b": 1}),
     (np.float32(1), np.float32(2)), (jnp.ones(2), 1.0), (jnp.sin, jnp.cos)],
)  # fmt: skip
def test_other_constants_make_another_function(first, second):
    assert not same(returning(first), returning(second))
    assert same(returning(first), returning(first))


def test_nan_equals_itself_and_arrays_do_not_count():
    assert same(returning(float("nan")), returning(float("nan")))
    assert same(returning(jnp.ones(2)), returning(jnp.zeros(2)))


def test_other_code_makes_another_function():
    assert not same(lambda: 1, lambda: 2)


def test_a_dict_that_changed_is_seen():
    settings = {"scale": 1.0}
    before = take_apart(returning(settings))[0]
    settings["scale"] = 2.0
    assert before != take_apart(returning(settings))[0]


def test_a_function_without_arrays_is_given_back_as_it_is():
    function = returning("a")
    closed, arrays = take_apart(function)
    assert arrays == ()
    assert closed.function(()) is function


def test_a_function_that_calls_itself_is_left_alone():
    def again(n):
        return again(n - 1) if n else 0

    assert take_apart(again) is None


def test_one_object_is_one_function_even_if_its_list_has_grown():
    seen, traces = [], []

    def noting(params, x, y):
        seen.append(1)
        return loss(params, x, y)

    @jax.jit
    def use(extras, params):
        traces.append(1)
        return extras["value_fn"](params)

    evaluate = optalr.value_grad_and_extras(noting)
    for i in range(3):
        use(evaluate(PARAMS, *batch(i))[2], PARAMS)
    assert len(traces) == 1
    assert len(seen) > 3


# A last batch that is smaller.


def test_a_smaller_last_batch_costs_one_compilation_and_the_next_full_one_none():
    traces = []
    tx = optalr.scale_by_kronecker(update_every=1, signals_every=1)
    evaluate = optalr.value_grad_and_extras(loss)

    @jax.jit
    def step(params, state, x, y):
        traces.append(1)
        _, grads, extras = evaluate(params, x, y)
        _, state = tx.update(grads, state, params, **extras)
        return params, state, extras["signals"]["w"]

    state = tx.init(PARAMS)
    for i, size in enumerate([4, 4, 3, 4, 3]):
        _, state, _ = step(PARAMS, state, *batch(i, size))
    assert len(traces) == 2


def test_moments_of_a_smaller_batch_mean_the_same():
    """Moments are means over examples: a batch and the same batch twice give the same ones."""
    evaluate = jax.jit(optalr.value_grad_and_extras(loss))
    x, y = batch(1)
    twice = jnp.concatenate([x, x]), jnp.concatenate([y, y])
    tx = optalr.scale_by_kronecker(decay=0.9, signals_every=1)
    states = []
    for data in ((x, y), twice):
        _, grads, extras = evaluate(PARAMS, *data)
        states.append(tx.update(grads, tx.init(PARAMS), PARAMS, **extras)[1])
        assert float(extras["signals"]["w"].count) == len(data[0])
    for side in ("rows", "cols"):
        one, other = (getattr(state.memory, side).factor["w"] for state in states)
        np.testing.assert_allclose(one, other, rtol=1e-5)
