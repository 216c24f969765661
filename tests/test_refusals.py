"""What is of no use is refused where it is passed, by the name of its argument."""

import inspect
import operator
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import equinox
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optalr
from tests.contract import problem
from tests.contract.registry import METHODS

ROOT = pathlib.Path(__file__).parents[1]
SOFTMAX = {"loss": "softmax", "num_classes": 3}
# The least that each factory can be called with.
LEAST = {
    "tso_alra": {"learning_rate": 0.1},
    "untuned": {"total_steps": 100},
    "learned_rate_sgd": {"initial_rate": 0.1},
    "learned_rate_then": {
        "second": optax.sgd,
        "initial_rate": 0.1,
        "phase": optalr.switch_at(2),
    },
    "lipschitz_sgd": SOFTMAX,
    "lipschitz_adam": SOFTMAX,
    "edf": {"learning_rate": 0.1},
    "classical": {"rule": "sgd", "learning_rate": 0.1},
    "swats": {},
    "scale_by_kronecker": {},
    "scale_by_block_diagonal": {},
    "scale_by_full_matrix": {},
    "scale_by_krylov_flow": {},
    "scale_by_learned_rate": {"initial_rate": 0.1},
    "scale_by_lipschitz_rate": SOFTMAX,
    "scale_by_local_gains": {},
    "scale_by_recorded_rate": {"learning_rate": 0.1},
    "add_learned_decay": {"initial_decay": 0.1},
    "accelerate_by_nesterov_flow": {},
    "guard": {"inner": optax.sgd(0.1)},
    "two_stage": {"first": optax.sgd(0.1), "second": optax.sgd(0.1), "phase": 0.5},
    "paper.tso_alra": {"learning_rate": 0.1},
    "paper.learned_rate_sgd": {"initial_rate": 0.1},
    "paper.lipschitz_sgd": {**SOFTMAX, "steps_per_epoch": 2},
    "paper.edf": {"learning_rate": 0.1},
    "paper.swats": {},
    "paper.amsgrad": {"learning_rate": 0.1},
}
# Any string may be the name of an extra, or the key path of a layer.
ANY_NAME = {"probe", "last_layer"}
ARGUMENTS = [
    (name, parameter.name)
    for name in LEAST
    for parameter in inspect.signature(operator.attrgetter(name)(optalr)).parameters.values()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=".".join)
def test_what_is_of_no_use_is_refused_by_the_name_of_its_argument(name, argument):
    factory = operator.attrgetter(name)(optalr)
    factory(**LEAST[name])
    for useless in (object(), "none"):
        if useless == "none" and argument in ANY_NAME:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
            factory(**{**LEAST[name], argument: useless})


def test_gains_may_be_a_mapping_of_their_arguments():
    gains = optalr.scale_by_local_gains(0.2, max_gain=3.0)
    one, two = (
        optalr.classical("sgd", 0.1, gains=g) for g in (gains, {"beta": 0.2, "max_gain": 3})
    )
    for tx in (one, two):
        state, params = tx.init({"w": 1.0}), {"w": 1.0}
        for _ in range(9):
            updates, state = tx.update({"w": 0.5}, state, params)
        assert float(updates["w"]) == pytest.approx(-0.1 * 2.6 * 0.5)  # gain 1 + 8 · 0.2


def test_momentum_of_none_is_written_as_none_or_zero():
    with pytest.raises(TypeError, match=r"momentum must be a number, got 'none'. None is for none"):
        optalr.tso_alra(1e-2, momentum="none")
    optalr.tso_alra(1e-2, momentum=None)
    optalr.tso_alra(1e-2, momentum=0)


@pytest.mark.parametrize("number", ["1e-2", "100", b"1"])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("tso_alra", "learning_rate"),
        ("edf", "learning_rate"),
        ("learned_rate_sgd", "initial_rate"),
        ("untuned", "total_steps"),
        ("untuned", "scale"),
        ("tso_alra", "update_every"),
    ],
)
def test_a_number_in_quotes_is_refused(name, argument, number):
    with pytest.raises(TypeError, match=rf"{argument} must be a (whole )?number, got b?['\"]"):
        getattr(optalr, name)(**{**LEAST[name], argument: number})


# Its state is that of the wrapper it is given, which is optax's own.
STATES = [method for method in METHODS if method.name != "pass_extras"]


@pytest.mark.parametrize("method", STATES, ids=repr)
def test_what_is_no_state_of_a_method_is_refused(method):
    tx, params, batch = method.make(), problem.make_params(), problem.make_batch()
    _, grads, extras = problem.evaluate(params, batch)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, params))
    exchanged = {"a": (state, grads, params), "b": (grads, params, state)}
    others = {"c": (grads, optax.adam(1e-2).init(params), params), "d": (grads, tx, params)}
    for arguments in (exchanged | others).values():
        with pytest.raises(
            (TypeError, ValueError), match=r"state.*tx\.init\(params\)|updates must"
        ):
            jax.eval_shape(lambda args=arguments: tx.update(*args, **extras))


def test_a_transformation_in_the_place_of_its_state_is_refused():
    readers = (optalr.wants_signals, optalr.metrics, optalr.state_bytes, optalr.factor_spectra)
    for read in readers:
        with pytest.raises(TypeError, match=r"opt_state must be .* state.*tx\.init\(params\)"):
            read(optax.adam(1e-2))


def test_extras_that_are_passed_wrongly_are_refused():
    params, batch = problem.make_params(), problem.make_batch()
    tx = optalr.tso_alra(1e-2)
    _, grads, extras = problem.evaluate(params, batch)
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"called 'extras'.*\*\*extras"):
        tx.update(grads, state, params, extras=extras)
    for name in ("untuned", "learned_rate_sgd"):
        tx = getattr(optalr, name)(**LEAST[name])
        probe = "validation_value_fn" if name == "untuned" else "value_fn"
        with pytest.raises(TypeError, match=rf"{probe}.* must be a function.*Partial\(loss_fn"):
            tx.update(grads, tx.init(params), params, **{**extras, probe: 0.3})


@pytest.mark.parametrize("passed", [{}, {"unknown": 1.0}], ids=["none", "another"])
@pytest.mark.parametrize("method", [m for m in METHODS if m.needs], ids=repr)
def test_a_missing_extra_is_refused_in_a_few_words(method, passed):
    tx, params = method.make(), problem.make_params()
    with pytest.raises(TypeError, match=r"needs the extra .*, which update did not get") as caught:
        jax.eval_shape(lambda: tx.update(params, tx.init(params), params, **passed))
    message = str(caught.value)
    # One remedy, and where none of them arrived, what a wrapper may have done.
    assert len(message) <= (310 if passed else 480)
    assert "to update" in message
    # The page is by its name, and is there.
    (page,) = re.findall(r"docs/\w+\.md", message)
    assert (ROOT / page).exists()


def test_a_long_value_is_described_and_not_printed():
    params = problem.make_params()
    for call in (lambda p, _: optalr.value_grad_and_extras(p), optalr.coverage):
        with pytest.raises(
            TypeError, match=r"loss_fn must be a function, got .{,40}dict"
        ) as caught:
            call(params, params)
        assert len(str(caught.value)) < 160


def test_what_evaluates_a_loss_is_no_loss():
    evaluate = optalr.value_grad_and_extras(lambda w: jnp.sum(w**2))
    with pytest.raises(TypeError, match=r"loss_fn must return a loss.*value_grad_and_extras"):
        optalr.coverage(evaluate, jnp.ones(3))


class Module(NamedTuple):
    """A tree with a function in it, as the modules of some frameworks are."""

    weight: Any
    activation: Any


def test_a_function_among_the_parameters_is_refused_by_its_name():
    params = Module(jnp.ones((2, 2)), jax.nn.relu)
    grads = Module(jnp.ones((2, 2)), None)
    tx = optalr.tso_alra(1e-2, statistics="gradient")
    state = tx.init(grads)
    for call in (
        lambda: tx.init(params),
        lambda: tx.update(grads, state, params),
        lambda: optalr.value_grad_and_extras(lambda p: jnp.sum(p.weight))(params),
    ):
        with pytest.raises(TypeError, match=r"params must be .*\.activation is.*out of params"):
            call()


def test_the_remedy_is_that_of_the_framework():
    model = equinox.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"eqx\.partition\(model, eqx\.is_inexact_array\)"):
        optalr.untuned(10).init(model)
    dropping = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"optalr\.adapters\.nnx"):
        optalr.value_grad_and_extras(lambda m: 0.0)(dropping)


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optalr.two_stage(tx, optax.sgd(0.1), optalr.switch_at(9)),
        optalr.guard,
        lambda tx: optalr.multi_steps(tx, 1),
        lambda tx: optalr.pass_extras(lambda inner: inner, tx),
        lambda tx: optalr.adapters.packing.unpack_extras(tx),
    ],
)
def test_extras_reach_what_multi_steps_of_optax_wraps(around):
    tx = around(optax.MultiSteps(optalr.learned_rate_sgd(0.1), 2))
    params, batch = problem.make_params(), problem.make_batch()
    _, grads, extras = problem.evaluate(params, batch)
    updates, _ = jax.eval_shape(lambda: tx.update(grads, tx.init(params), params, **extras))
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_adapters_are_found_after_the_package_alone_is_imported():
    program = "import optalr; optalr.adapters.linen.TrainState; optalr.adapters.packing"
    subprocess.run([sys.executable, "-c", program], check=True)
