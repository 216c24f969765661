"""The reference holds every public name, once, with a line in its page's table."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import re
from collections import Counter
from typing import Any, NamedTuple

import pytest

import optalr
from optalr import linalg, paper, phases, schedules
from tests.syntax import public_definitions

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "api").glob("*.md"))
ADAPTERS = public_definitions("adapters")  # modules that ``import optalr`` does not import
# What a user writes to reach a public name, and what stands there.
PUBLIC = {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in (optalr, linalg, schedules, phases, paper)
    for name in room.__all__
}


class Entry(NamedTuple):
    """One ``:::`` of a page: what it names, what stands over it, and the line that leads there."""

    page: str
    identifier: str
    heading: str
    listed: bool


def entries_of(page: pathlib.Path) -> list[Entry]:
    text = page.read_text()
    found = re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.MULTILINE)
    entries = []
    for identifier, options in found:
        heading = re.search(r"heading: (\S+)", options)
        shown = heading.group(1) if heading else identifier
        row = f"| [`{shown.removeprefix('optalr.')}`][{identifier}] | "
        entries.append(Entry(page.name, identifier, shown, row in text))
    return entries


ENTRIES = [entry for page in PAGES for entry in entries_of(page)]
by_identifier = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.identifier)


def resolve(identifier: str) -> Any:
    """Return the object that a dotted name stands for, modules before members; None for none."""
    parts = identifier.split(".")
    for stop in range(len(parts), 0, -1):
        name = ".".join(parts[:stop])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        for part in parts[stop:]:
            found = getattr(found, part, None)
        return found
    return None


@by_identifier
def test_an_entry_names_something_that_exists(entry):
    documented = resolve(entry.identifier)
    assert documented is not None
    assert documented is (
        resolve(entry.heading) if entry.heading not in PUBLIC else PUBLIC[entry.heading]
    )


@by_identifier
def test_an_entry_is_not_hidden_by_a_module_of_its_name(entry):
    """The pages are made from the source, where ``optalr.swats`` leads to a module first."""
    if not inspect.ismodule(resolve(entry.identifier)):  # of a room the docstring alone is shown
        assert not leads_to_a_module(entry.identifier), "name the object where it is defined"


def leads_to_a_module(identifier: str) -> bool:
    """Return whether the way to a name, by the imports in the source, ends at a module."""
    module, _, name = identifier.rpartition(".")
    while True:
        spec = importlib.util.find_spec(module)
        is_package = spec.submodule_search_locations is not None
        if is_package and importlib.util.find_spec(f"{module}.{name}") is not None:
            return True
        module = imported_from(pathlib.Path(spec.origin), name)
        if module is None:
            return False


def imported_from(path: pathlib.Path, name: str) -> str | None:
    """Return the module from which a file imports ``name``; None where it does not."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return node.module
    return None


@pytest.mark.parametrize("name", [*PUBLIC, *ADAPTERS])
def test_every_public_name_has_an_entry(name):
    wanted = PUBLIC[name] if name in PUBLIC else resolve(name)
    found = [entry for entry in ENTRIES if resolve(entry.identifier) is wanted]
    assert len(found) == 1, f"{name} has {len(found)} entries in docs/api"
    if not inspect.ismodule(wanted):
        assert found[0].listed, f"the table of {found[0].page} lacks {name}"


def test_the_adapters_are_found_where_they_are_defined():
    known = {"linen.TrainState", "nnx.Optimizer", "packing.PackedExtras", "wrappers.multi_steps"}
    assert {f"optalr.adapters.{name}" for name in known} <= set(ADAPTERS)
    assert not [name for name in ADAPTERS if resolve(name) is None]


def test_no_entry_stands_twice():
    counts = Counter(entry.identifier for entry in ENTRIES)
    assert not [identifier for identifier, count in counts.items() if count > 1]


def test_contributing_names_every_room():
    text = (DOCS.parent / "CONTRIBUTING.md").read_text()
    package = pathlib.Path(optalr.__file__).parent
    modules = [path.name for path in package.glob("[!_]*.py")]
    folders = [path.parent.relative_to(package) for path in package.rglob("__init__.py")]
    rooms = [f"{folder}/" for folder in folders if 1 <= len(folder.parts) <= 2]
    assert not [room for room in [*modules, *rooms] if f"`{room}`" not in text]


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}" in navigation


def test_a_newcomer_meets_the_thirty_lines_first():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    pages = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert pages[:2] == ["index.md", "thirty_lines.md"]
    assert "docs/thirty_lines.md" in (DOCS.parent / "README.md").read_text()
    assert "(thirty_lines.md)" in (DOCS / "index.md").read_text()


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "configs/README.md", "examples/algoperf/README.md"],
)
def test_links_between_files_lead_somewhere(name):
    source = DOCS.parent / name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source.read_text()):
        assert (source.parent / target).exists(), f"{name} links to {target}"
