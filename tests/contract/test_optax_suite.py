"""optax's own contract suite, the one shipped in its wheel, run over optalr's recipes.

The module is loaded from its file and left as it is; only its lists of optimizers and its look-up
by name are replaced before its test class is read, which is when they are expanded into tests.
"""

import importlib.util
import pathlib

import optax
import pytest

import optalr

SUITE = pathlib.Path(optax.__file__).parent / "contrib" / "_common_test.py"

Rate = optax.ScalarOrSchedule  # the annotation by which the suite knows that schedules are taken


def local_gains(learning_rate: Rate):
    rate = optalr.scale_by_recorded_rate(learning_rate)
    return optax.chain(optalr.scale_by_local_gains(), rate)


def classical(learning_rate: Rate):
    return optalr.classical("nesterov", learning_rate)


def tso_alra(learning_rate: Rate):
    return optalr.tso_alra(learning_rate, statistics="gradient")


def full_matrix(learning_rate: Rate):
    direction = optalr.scale_by_full_matrix(damping=1e-2)
    return optax.chain(direction, optalr.scale_by_recorded_rate(learning_rate))


def two_stage(learning_rate: Rate):
    second = optax.chain(optax.trace(0.9), optalr.scale_by_recorded_rate(1e-4))
    return optalr.two_stage(optax.adam(learning_rate), second, optalr.switch_at(1_000))


# Recipes that need no extra arguments, at rates that solve the suite's four problems.
RECIPES = {
    "swats": (optalr.swats, {"learning_rate": 1e-2}),
    "local_gains": (local_gains, {"learning_rate": 1e-4}),
    "classical": (classical, {"learning_rate": 1e-4}),
    "tso_alra": (tso_alra, {"learning_rate": 1e-2}),
    "full_matrix": (full_matrix, {"learning_rate": 1e-2}),
    "two_stage": (two_stage, {"learning_rate": 1e-2}),
}


def load_suite():
    """Return optax's suite as source, with optalr's recipes in the place of optax's optimizers."""
    spec = importlib.util.spec_from_file_location("optax_contract_suite", SUITE)
    module = importlib.util.module_from_spec(spec)
    marker = "def _get_opt_factory"
    source = SUITE.read_text()
    assert source.count(marker) == 1, "optax's suite has changed: adapt this loader"
    lists, tests = source.split(marker)
    exec(compile(lists, str(SUITE), "exec"), module.__dict__)
    module._MAIN_OPTIMIZERS_UNDER_TEST = module._ALL_OPTIMIZERS_UNDER_TEST = tuple(
        {"opt_name": name, "opt_kwargs": kwargs, "wrapper_name": None, "wrapper_kwargs": None}
        for name, (_, kwargs) in RECIPES.items()
    )
    exec(compile(marker + tests, str(SUITE), "exec"), module.__dict__)
    module._get_opt_factory = lambda name: RECIPES[name][0]
    return module


SUITE_MODULE = load_suite()


@pytest.mark.filterwarnings("default")  # the suite's own code is not held to -W error
class TestOptaxContract(SUITE_MODULE.ContribTest):
    pass


def test_every_recipe_solves_the_four_problems_of_the_suite():
    solved = [n for n in dir(TestOptaxContract) if n.removeprefix("test_optimizers").isdigit()]
    assert len(solved) == 4 * len(RECIPES)
