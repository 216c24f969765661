"""The registry is complete: no public transformation escapes the contract."""

import inspect
import types

import pytest

import optalr
from tests.contract.registry import CHOICES, METHODS


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
]


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
    assert mentioned & set(TRANSFORMATIONS)
    if method.name not in CHOICES:
        assert method.name in mentioned
