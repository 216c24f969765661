"""Methods beside the transformations of optax: what takes extras, and what drops them."""

import ast
import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optalr
from optalr.signals.binding.neighbours import OTHER_EXTRAS
from optalr.states import settle
from tests.contract import problem
from tests.contract.registry import METHODS

every_method = pytest.mark.parametrize("method", METHODS, ids=repr)
PARAMS, BATCH = problem.make_params(), problem.make_batch()
LINE_SEARCH = functools.partial(optax.scale_by_backtracking_linesearch, 5, store_grad=True)


def traced(tx, params=PARAMS, **more):
    """Return the shapes of a state, updates and new state: a step traced, not compiled."""

    def step(params):
        state = tx.init(params)
        _, grads, extras = problem.evaluate(getattr(params, "fast", params), BATCH)
        return state, tx.update(grads, state, params, **extras, **more)

    return jax.eval_shape(step, params)


def assert_steps(tx, **more):
    """Check that a step passes, and that its updates are those of parameters."""
    _, (updates, _) = traced(tx, **more)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


def types_of(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


# Neighbours in a chain.

NEIGHBOURS = {
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(5),
    "zoom": lambda: optax.scale_by_zoom_linesearch(5),
    "lbfgs": optax.lbfgs,
    "polyak": optax.scale_by_polyak,
    "polyak_sgd": optax.polyak_sgd,
    "reduce_on_plateau": contrib.reduce_on_plateau,
    "momo": contrib.momo,
    "momo_adam": contrib.momo_adam,
    "prodigy": contrib.prodigy,
    "dadapt_adamw": contrib.dadapt_adamw,
    "sophia": lambda: contrib.sophia(1e-2),
    "mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "snapshot": lambda: optax.snapshot("a", lambda updates: updates),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
}


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_takes_all_extras(name, after):
    ours = optalr.learned_rate_sgd(0.1)
    parts = (ours, NEIGHBOURS[name]()) if after else (NEIGHBOURS[name](), ours)
    assert_steps(optax.chain(*parts), obj_fn=problem.evaluate(PARAMS, BATCH)[2]["value_fn"])


@every_method
def test_a_line_search_follows_every_method(method):
    assert_steps(optax.chain(method.make(), LINE_SEARCH()))


def test_a_line_search_takes_extras_across_jit_and_leaves_its_gradient_in_the_state():
    tx, traces = optax.chain(optalr.scale_by_local_gains(), optax.scale(-1.0), LINE_SEARCH()), []

    @jax.jit
    def update(grads, state, params, extras):
        traces.append(1)
        return tx.update(grads, state, params, **extras)

    # optax starts with weak types, which would cost a compilation more.
    params, state = PARAMS, settle(tx.init(PARAMS))
    values = []
    for _ in range(3):
        value, grads, extras = problem.evaluate(params, BATCH, signals=False)
        values.append(float(value))
        updates, state = update(grads, state, params, extras)
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1
    assert values[2] < values[1] < values[0]
    value, grads = optax.value_and_grad_from_state(extras["value_fn"])(params, state=state)
    expected, expected_grads, _ = problem.evaluate(params, BATCH, signals=False)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected_grads)


@every_method
def test_value_and_gradient_are_found_in_a_state_beside_any_method(method):
    """optax looks for the one entry of this name in the whole state."""
    state = optax.chain(method.make(), LINE_SEARCH()).init(PARAMS)
    assert optax.tree.get(state, "value") is not None
    assert optax.tree.get(state, "grad") is not None


def test_a_line_search_names_an_extra_that_nobody_knows():
    if "remaining_kwargs:" not in inspect.getsource(inspect.getmodule(LINE_SEARCH.func)):
        pytest.skip("this optax ignores it")
    with pytest.raises(TypeError, match="weather"):
        traced(optax.chain(optax.sgd(0.1), LINE_SEARCH()), weather=1.0)


def test_every_extra_is_known_to_a_loss():
    own = {"value", "grad", "value_fn"}
    assert set(problem.evaluate(PARAMS, BATCH)[2]) - own <= set(OTHER_EXTRAS)
    assert read_by_methods() - own <= set(OTHER_EXTRAS)
    for make in (optalr.value_grad_and_extras, functools.partial(optalr.full_batch, chunk_size=2)):
        loss = optalr.composite_loss(problem.predict, problem.output_loss)
        value_fn = make(loss)(PARAMS, *BATCH)[2]["value_fn"]
        assert set(OTHER_EXTRAS) <= set(inspect.signature(value_fn).parameters)
        others = dict.fromkeys((*OTHER_EXTRAS, "weather"), 0)
        np.testing.assert_array_equal(value_fn(PARAMS), value_fn(PARAMS, **others))


def read_by_methods():
    """Return the literal names that the package reads from extras."""
    names = set()
    for path in pathlib.Path(optalr.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and is_extras(node.value):
                names.add(getattr(node.slice, "value", None))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "get" and is_extras(node.func.value):
                    names.add(getattr(node.args[0], "value", None))
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_extra":
                names.add(getattr(node.args[1], "value", None))
    return {name for name in names if isinstance(name, str)}


def is_extras(node):
    return getattr(node, "attr", getattr(node, "id", "")) in {"extras", "extra_args"}


# Wrappers.

HIDDEN = {"hidden": True, "output": False}
PASSING = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step < 9),
    "conditionally_mask": lambda tx: optax.conditionally_mask(
        tx, lambda step, **extras: step < 9, forward_extra_args=True
    ),
    "masked": lambda tx: optax.masked(tx, HIDDEN),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)}, {"hidden": "a", "output": "b"}
    ),
    "multi_transform": lambda tx: optax.multi_transform(
        {"a": tx, "b": optax.sgd(0.1)}, {"hidden": "a", "output": "b"}
    ),
    "chain": lambda tx: optax.chain(tx),
    "named_chain": lambda tx: optax.named_chain(("method", tx)),
    "selective_transform": lambda tx: optax.selective_transform(
        tx, freeze_mask={"hidden": False, "output": True}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(
        tx, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "schedule_free": lambda tx: contrib.schedule_free(tx, 0.1),
    "mechanize": contrib.mechanize,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(rate=1.0),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_wrapper_passes_extras(name):
    for tx in (optalr.learned_rate_sgd(0.1), optalr.lipschitz_sgd("softmax", num_classes=3)):
        assert_steps(PASSING[name](tx))


ADVERSARY = optax.chain(contrib.normalize(), optax.sgd(0.1))
DROPPING = {
    "lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "lookahead_reset": lambda tx: optax.lookahead(tx, 2, 0.5, reset_state=True),
    "sam": lambda tx: contrib.sam(tx, ADVERSARY),
    "split": contrib.split_real_and_imaginary,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


def params_of(name):
    return optax.LookaheadParams.init_synced(PARAMS) if "lookahead" in name else PARAMS


@pytest.mark.parametrize("name", DROPPING)
@every_method
def test_extras_pass_a_wrapper_that_drops_them(method, name):
    if name == "sam" and method.name == "three_stages":
        pytest.skip("the state holds an infinity, which sam multiplies by 0")
    wrapped = optalr.pass_extras(DROPPING[name], method.make())
    state, (_, new_state) = traced(wrapped, params_of(name))
    assert types_of(new_state) == types_of(state)


@pytest.mark.parametrize("name", DROPPING)
def test_a_chain_with_a_wrapper_that_drops_extras_says_what_to_write(name):
    if name == "sam":
        with pytest.raises(TypeError, match="unexpected keyword"):
            traced(optax.chain(DROPPING[name](optalr.learned_rate_sgd(0.1))))
        return
    with pytest.raises(TypeError, match=r"value_fn.*wrapper drops them.*optalr\.pass_extras"):
        traced(optax.chain(DROPPING[name](optalr.learned_rate_sgd(0.1))), params_of(name))


def test_with_other_extras_there_no_wrapper_is_blamed():
    tx = optalr.learned_rate_sgd(0.1)
    with pytest.raises(TypeError, match="value_fn") as caught:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.float32(1.0))
    assert "a wrapper" not in str(caught.value)
