"""Tests of one method stand together, so that one worker runs them and compiles its step once."""

import pathlib

import pytest

from tests.contract.registry import CHOICES, PAPER

SUITE = pathlib.Path(__file__).with_name("test_contract.py")
MESHES = SUITE.with_name("test_meshes.py")
ON_MESH = ("scale_by_kronecker", "scale_by_full_matrix", "tso_alra", "lipschitz_sgd", "edf")


def pytest_collection_modifyitems(items):
    """Sort the contract's tests by method, in the places that they have among all tests.

    Those of the papers' own forms, and of choices beside a method's defaults, run among the slow
    ones: the fast ones have no room for more. On a mesh only a method of each kind is fast.
    """
    for item in items:
        if item.path.parent == SUITE.parent and hasattr(item, "callspec"):
            name = getattr(item.callspec.params.get("method"), "name", "")
            on_mesh = item.path == MESHES and name not in ON_MESH
            if name.startswith(PAPER) or name in CHOICES or on_mesh:
                item.add_marker(pytest.mark.slow)
    places = [i for i, item in enumerate(items) if item.path == SUITE]
    suite = sorted((items[i] for i in places), key=lambda item: item.callspec.params["method"].name)
    for place, item in zip(places, suite, strict=True):
        items[place] = item
