"""The page on wrappers and extras names all of them, and says what the tests show."""

import inspect
import pathlib
import re

import optax
import pytest
from optax import contrib

import optalr
from tests.contract import test_neighbours as neighbours
from tests.contract.test_neighbours import ADVERSARY, assert_steps

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "wrappers.md").read_text()
ROWS = dict(re.findall(r"^\| `(optax\.[\w.]+)` \| (\w+)", PAGE, re.MULTILINE))
# They take a transformation and do not run it as the optimizer of the parameters.
NOT_WRAPPERS = {
    "lbfgs",  # its line search
    "monitor",  # what it measures
    "sophia",  # its estimator
    "with_extra_args_support",  # nothing but a type
    "inject_stateful_hyperparams",  # deprecated, for inject_hyperparams
}


def wrappers(module, prefix):
    """Return the functions of a module that take a transformation, by their annotations."""
    return {
        f"{prefix}.{name}"
        for name, found in vars(module).items()
        if not name.startswith("_") and callable(found) and name not in NOT_WRAPPERS
        and takes_a_transformation(found)
    }  # fmt: skip


def takes_a_transformation(function):
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any("GradientTransformation" in str(p.annotation) for p in parameters)


def test_every_wrapper_of_optax_has_a_row():
    assert wrappers(optax, "optax") | wrappers(contrib, "optax.contrib") <= set(ROWS)


def test_every_wrapper_of_optax_experimental_is_named_as_left_out():
    modules = vars(pytest.importorskip("optax.experimental"))
    found = [
        wrapper
        for prefix, module in modules.items()
        if inspect.ismodule(module) and not prefix.startswith("_")
        for wrapper in wrappers(module, prefix)
    ]
    assert found
    assert not [wrapper for wrapper in found if f"{wrapper}`" not in PAGE]


def test_what_takes_a_gradient_of_each_example_refuses_extras():
    aggregating = pytest.importorskip("optax.experimental").aggregating
    inner = optalr.learned_rate_sgd(0.1)
    mean = aggregating.average_per_element_updates()
    for tx in (
        aggregating.process(optax.identity(), mean, inner),
        aggregating.add_mean_variance_to_opt(inner),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            assert_steps(tx)


def test_a_wrapper_that_the_page_says_passes_extras_is_tested_to():
    passing = {name.rpartition(".")[2] for name, verb in ROWS.items() if verb == "passes"}
    assert passing == set(neighbours.PASSING)


REFUSING = {
    "optax.lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "optax.contrib.split_real_and_imaginary": contrib.split_real_and_imaginary,
    "optax.contrib.sam": lambda tx: contrib.sam(tx, ADVERSARY),
    "optax.contrib.scale_by_galore": lambda tx: contrib.scale_by_galore(base_optimizer=tx),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSING)
def test_a_wrapper_refuses_extras(name):
    assert ROWS[name] == "refuses"
    with pytest.raises(TypeError, match="unexpected keyword"):
        assert_steps(REFUSING[name](optalr.learned_rate_sgd(0.1)))


def test_the_others_drop_and_hide():
    assert {name for name, verb in ROWS.items() if verb == "drops"} == {"optax.contrib.galore"}
    with pytest.raises(TypeError, match="value_fn"):
        assert_steps(contrib.galore(0.1, base_optimizer=optalr.learned_rate_sgd(0.1)))
    assert {name for name, verb in ROWS.items() if verb == "hides"} == {"optax.flatten"}
    with pytest.raises(ValueError, match="point"):
        assert_steps(optax.flatten(optalr.learned_rate_sgd(0.1)))


def test_every_extra_that_a_method_reads_has_a_row():
    table = PAGE.partition("## Who reads what")[2].partition("## Beside")[0]
    firsts = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    named = {name for first in firsts for name in re.findall(r"`(\w+)`", first)}
    assert neighbours.read_by_methods() <= named
    loss = optalr.composite_loss(neighbours.problem.predict, neighbours.problem.output_loss)
    evaluate = optalr.value_grad_and_extras(loss)
    extras = evaluate(neighbours.PARAMS, *neighbours.BATCH, signals=False)[2]
    assert set(extras) <= named
