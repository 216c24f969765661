"""The page on the five sources names what is there, and says of every row what came of it."""

import ast
import functools
import operator
import pathlib
import re
from typing import NamedTuple

import pytest

import optalr
from optalr.experiments.configs.files import load_config
from optalr.experiments.configs.methods import RECIPES

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = DOCS / "five_sources.md"
COLUMNS = ["equation", "function", "test", "experiment", "claim", "measured", "holds"]


class Row(NamedTuple):
    """One line of a table, and the source that it belongs to."""

    source: str
    cells: dict[str, str]

    def names(self, column):
        return re.findall(r"`([^`]+)`", self.cells[column])

    def __repr__(self):
        return f"{self.source}: {self.cells['equation']}"


def rows_of(text):
    rows = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, *lines = section.splitlines()
        table = [[c.strip() for c in x.strip("|").split(" | ")] for x in lines if x[:1] == "|"]
        assert table[0] == COLUMNS, title
        rows += [Row(title, dict(zip(COLUMNS, cells, strict=True))) for cells in table[2:]]
    return rows


ROWS = rows_of(PAGE.read_text())
every_row = pytest.mark.parametrize("row", ROWS, ids=repr)


@functools.cache
def defined_in(path):
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def headings(page):
    """Return the anchors that mkdocs makes of a page's headings."""
    found = re.findall(r"^#+ (.*)$", (DOCS / page).read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in found]
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


def test_the_page_has_a_table_for_each_source():
    assert len({row.source for row in ROWS}) == 5
    assert len(ROWS) > 40


@every_row
def test_the_functions_of_a_row_exist(row):
    assert row.names("function")
    for name in row.names("function"):
        assert callable(operator.attrgetter(name)(optalr))


@every_row
def test_the_tests_of_a_row_exist(row):
    assert row.names("test")
    for name in row.names("test"):
        path, _, function = name.partition("::")
        assert function in defined_in(path), name


@every_row
def test_the_experiments_of_a_row_exist(row):
    assert row.names("experiment") or row.cells["experiment"] == "–"
    for name in row.names("experiment"):
        assert (ROOT / name).exists(), name


@every_row
def test_every_cell_says_something(row):
    assert all(row.cells.values())


@every_row
def test_a_row_has_its_verdict_and_what_it_rests_on(row):
    """A link may lead to more, and does not take the place of a number or a word."""
    assert not re.search(r"\bsee\b|\]\(|^–$", row.cells["holds"])
    beside = re.sub(r"\[the table\]\([^)]*\)", "", row.cells["measured"]).strip()
    assert beside
    if beside == "–":
        assert row.cells["holds"].startswith("not run")


@every_row
def test_an_experiment_trains_by_the_recipe_that_its_row_names(row):
    recipes = set(row.names("function")) & set(RECIPES)
    for name in row.names("experiment"):
        path = ROOT / name
        files = sorted(path.glob("*.toml")) or [path]
        if recipes and path.suffix != ".py":
            assert recipes & {load_config(file).method.name for file in files}, name


def test_links_to_other_pages_lead_to_headings():
    for page, anchor in re.findall(r"\]\(([\w/]+\.md)#([\w-]+)\)", PAGE.read_text()):
        assert anchor in headings(page), f"{page}#{anchor}"


def test_every_source_to_the_letter_and_every_recipe_is_on_the_page():
    named = {name for row in ROWS for name in row.names("function")}
    assert {f"paper.{name}" for name in optalr.paper.__all__} <= named
    assert {"tso_alra", "learned_rate_sgd", "lipschitz_sgd", "edf", "swats", "classical"} <= named
