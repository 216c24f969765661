"""Every public name explains itself, in the sections that the reference pages understand."""

import inspect
from collections.abc import Mapping

import pytest

import optalr

PUBLIC = {
    name: getattr(optalr, name)
    for name in optalr.__all__
    if not isinstance(getattr(optalr, name), Mapping)  # tables: documented where they are used
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


@pytest.mark.parametrize("name", [n for n, v in PUBLIC.items() if not inspect.ismodule(v)])
def test_every_public_name_has_a_docstring(name):
    assert inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_documents_arguments_and_shows_an_example(name):
    function, text = FUNCTIONS[name], inspect.getdoc(FUNCTIONS[name]) or ""
    if inspect.signature(function).parameters:
        assert "Args:" in text
        for parameter in inspect.signature(function).parameters:
            assert parameter in text, f"{name} does not document {parameter}"
    assert "Returns:" in text
    assert "Examples:" in text
    assert ">>> " in text


@pytest.mark.parametrize(
    "name", [n for n in FUNCTIONS if n.startswith("scale_by_") and n != "scale_by_recorded_rate"]
)
def test_every_method_names_its_cost_and_source(name):
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    assert "Cost:" in text
    assert "Reference:" in text
