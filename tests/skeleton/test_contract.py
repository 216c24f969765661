"""The skeleton keeps the contract: who starts from it starts from something whole."""

import inspect

import jax.numpy as jnp
import pytest

from tests.contract import test_contract as contract
from tests.contract.lines import Method
from tests.skeleton import method as optalr

SKELETON = Method(
    "scale_by_skeleton",
    lambda decay=0.9, damping=1e-8: optalr.scale_by_skeleton(decay, damping=damping),
    reports=("damping", "failures"),
)
# What the contract's tests take. Those that take more are about extras, of which it needs none.
GIVEN = {"method": SKELETON, "argument": "decay", "bad": jnp.nan}
CHECKS = {
    name: inspect.signature(check).parameters
    for name, check in vars(contract).items()
    if name.startswith("test_") and {*GIVEN, "tmp_path"} >= {*inspect.signature(check).parameters}
}


def assert_kept(name, tmp_path):
    given = {**GIVEN, "tmp_path": tmp_path}
    getattr(contract, name)(**{parameter: given[parameter] for parameter in CHECKS[name]})


@pytest.mark.parametrize("name", CHECKS)
def test_the_skeleton_keeps_the_contract(name, tmp_path):
    assert_kept(name, tmp_path)


def test_most_of_the_contract_was_run():
    assert len(CHECKS) >= 10
