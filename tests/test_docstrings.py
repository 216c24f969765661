"""Every public name explains itself, in the sections that the reference pages understand."""

import inspect
import pathlib
import re
from collections.abc import Mapping

import pytest

import optalr
from optalr import linalg, paper, schedules

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PUBLIC = {
    name: getattr(optalr, name)
    for name in optalr.__all__
    if not isinstance(getattr(optalr, name), Mapping)  # tables: documented where they are used
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
# Public modules beside the front door; ``linalg.inverse_root`` stands for a name in one.
INNER = {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module in (linalg, schedules, paper)
    for name in module.__all__
}
EVERYTHING = {n: v for n, v in {**PUBLIC, **INNER}.items() if not inspect.ismodule(v)}
SIGNATURES = {n: v for n, v in EVERYTHING.items() if not inspect.isclass(v)}


def fields(kind):
    """Return the fields of a NamedTuple or a dataclass, none for another class."""
    return getattr(kind, "_fields", None) or tuple(getattr(kind, "__dataclass_fields__", ()))


RECORDS = [n for n, v in EVERYTHING.items() if inspect.isclass(v) and fields(v)]


def entries(text, *titles):
    """Return the names with an entry in the sections of a docstring that bear these titles.

    An entry stands at the section's own indentation, as in ``  name: what it is``.
    """
    section, names, margin = False, [], None
    for line in text.splitlines():
        if re.match(r"\w", line):
            section, margin = line.strip() in {f"{title}:" for title in titles}, None
        elif section and line.strip():
            indent = len(line) - len(line.lstrip())
            margin = indent if margin is None else margin
            found = re.match(r"\*{0,2}(\w+)(?: \([^)]*\))?:", line.strip())
            if indent == margin:
                assert found, f"no entry: {line.strip()}"
                names.append(found[1])
    return names


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_public_name_has_a_docstring(name):
    assert inspect.getdoc(EVERYTHING[name])


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_arguments_section_has_the_parameters_of_the_signature(name):
    text = inspect.getdoc(SIGNATURES[name]) or ""
    assert entries(text, "Args") == list(inspect.signature(SIGNATURES[name]).parameters)


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_a_record_has_an_entry(name):
    documented = entries(inspect.getdoc(EVERYTHING[name]) or "", "Args", "Attributes")
    assert sorted(documented) == sorted(fields(EVERYTHING[name]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_shows_an_example(name):
    text = inspect.getdoc(FUNCTIONS[name]) or ""
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


def test_entries_are_read_at_the_margin_of_their_section():
    text = "Do.\n\nArgs:\n  a: first, where\n    b: is no entry.\n  *c: more.\n\nReturns:\n  d: no."
    assert entries(text, "Args") == ["a", "c"]


# What we train with, the same to the letter, and the page whose table has the departures.
PUBLISHED = {
    "tso_alra": ("tso_alra", "tso_alra.md"),
    "learned_rate_sgd": ("learned_rate_sgd", "learned_rate.md"),
    "lipschitz_sgd": ("lipschitz_sgd", "lipschitz_rate.md"),
    "edf": ("edf", "exponentially_decaying_flows.md"),
    "swats": ("swats", "lecture.md"),
    "classical": ("amsgrad", "lecture.md"),
}


def departures(text):
    """Return the items of the list of departures, each in one line."""
    _, _, rest = text.partition("Our departures")
    items = re.findall(r"^\* (.+(?:\n  .+)*)", rest, re.MULTILINE)
    return [re.sub(r"\s+", " ", item) for item in items]


def test_every_published_form_is_named():
    assert {form for form, _ in PUBLISHED.values()} == set(paper.__all__)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_lists_its_departures_from_the_paper(name):
    text, (form, page) = inspect.getdoc(FUNCTIONS[name]) or "", PUBLISHED[name]
    assert f"``optalr.paper.{form}``" in text
    assert f"docs/{page}" in text
    assert len(departures(text)) >= 2
    for item in departures(text):  # what the paper does; what we do, and why: what it changes
        found = re.match(r"[^;]+; ours .+: (.+)", item)
        assert found, item
        assert re.search(r"\d|not measured|none", found[1]), item


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_figures_of_the_departures_stand_on_the_page(name):
    text, shown = inspect.getdoc(FUNCTIONS[name]) or "", (DOCS / PUBLISHED[name][1]).read_text()
    figures = re.findall(r"\b\d+\.\d+\b", " ".join(departures(text)))
    assert not [figure for figure in figures if figure not in shown]
