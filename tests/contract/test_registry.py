"""The registry is complete: no public transformation escapes the contract."""

import inspect
import types

import pytest

import optalr
from tests.contract.lines import CLAUSES
from tests.contract.registry import CHOICES, METHODS, PAPER


def builds_a_transformation(function):
    return (
        "GradientTransformation" in str(inspect.signature(function).return_annotation)
        or function.__name__.startswith("scale_by_")
        or ".recipes." in function.__module__
    )


TRANSFORMATIONS = [
    name
    for name in optalr.__all__
    if inspect.isfunction(function := getattr(optalr, name)) and builds_a_transformation(function)
] + [f"{PAPER}{name}" for name in optalr.paper.__all__]


def names_in(code):
    """Return the names that a function mentions, those of functions within it included."""
    inner = (names_in(constant) for constant in code.co_consts if inspect.iscode(constant))
    return set(code.co_names).union(*inner)


def names_behind(function):
    """Return the names that a function mentions, and the helpers of its module that it calls."""
    names = names_in(function.__code__)
    helpers = [function.__globals__.get(name) for name in names]
    helpers = [h for h in helpers if isinstance(h, types.FunctionType)]
    return names.union(*(names_behind(helper) for helper in helpers))


def test_the_lines_are_the_public_transformations_and_their_choices():
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    assert set(names) == {*TRANSFORMATIONS, *CHOICES}
    assert CHOICES.isdisjoint(TRANSFORMATIONS)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_line_builds_what_its_name_says(method):
    mentioned = names_behind(method.make)
    assert mentioned & {name.removeprefix(PAPER) for name in TRANSFORMATIONS}
    if method.name not in CHOICES:
        assert set(method.name.split(".")) <= mentioned


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_exemption_names_its_clause_and_its_reason(method):
    clauses = [exemption.clause for exemption in method.exempt]
    assert set(clauses) <= set(CLAUSES)
    assert all(len(exemption.reason.split()) > 4 for exemption in method.exempt)
    if method.name.startswith(PAPER):
        assert method.guards is ("faults" not in clauses)
    else:
        assert not method.exempt, "only what runs a paper's text may leave a clause out"
