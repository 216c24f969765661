"""The layout is the architecture: imports point one way, and stay on public interfaces.

Each rule collects what breaks it, so that one run shows all of it.
"""

import ast
import collections
import graphlib
import sys

import pytest

from tests.syntax import imports, package, room_of

# A room may import itself and every room named after it on this list.
ORDER = ["experiments", "adapters", "programs", "suggestion", "recipes", "reading", "phases",
         "transforms", "schedules", "signals", "sharding", "linalg", "clocks", "states", "arrays",
         "arguments"]  # fmt: skip
# The same for the folders inside a room. The folders of ``transforms`` are methods, which never
# import each other.
ORDER_INSIDE = {
    "experiments": [
        "reports",
        "studies",
        "training",
        "records",
        "models",
        "data",
        "configs",
        "examples",
    ],
    "signals": ["tapping", "tracing", "binding"],
    "linalg": ["roots", "minres"],
    "recipes": ["paper"],
}
# What several methods share: no method itself.
SHARED = {"shared"}
# These use the library as its users do, by the front door of the house.
USERS = {"experiments", "adapters", "__main__"}
CORE_ALLOWED = {"jax", "numpy", "optax", "optalr", "jaxlib"}
STANDARD = frozenset(sys.stdlib_module_names)
# What a NamedTuple calls its public methods, and what Python calls the end of a process.
NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make", "_field_defaults", "_exit"}

MODULES = package()
FOLDERS = sorted({module.folder for module in MODULES.values()})
ARROWS = [(module, imported) for module in MODULES.values() for imported in imports(module.name)]


def child_of(folder: str, module: str) -> str | None:
    """Return the module or folder right inside ``folder`` that ``module`` is, or belongs to."""
    prefix = f"{folder}."
    return module.removeprefix(prefix).split(".")[0] if module.startswith(prefix) else None


def subfolders(folder: str) -> set[str]:
    return {name for other in FOLDERS if (name := child_of(folder, other))}


def arrows_inside(folder: str) -> dict[str, set[str]]:
    """Return what each child of a folder imports of its other children."""
    arrows = collections.defaultdict(set)
    for module, imported in ARROWS:
        own, other = child_of(folder, module.name), child_of(folder, imported.module)
        if own and other and other != own:
            arrows[own].add(other)
    return arrows


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


# Rooms.


def test_every_folder_is_a_package():
    assert set(FOLDERS) <= set(MODULES)


def test_every_room_has_its_place():
    assert {module.room for module in MODULES.values()} - {None, "__main__"} == set(ORDER)


@pytest.mark.parametrize("room", [room for room in ORDER if room != "transforms"])
def test_every_folder_of_a_room_has_its_place(room):
    assert subfolders(f"optalr.{room}") == set(ORDER_INSIDE.get(room, ()))


def test_imports_point_one_way():
    broken = [
        f"{module.name} imports {imported}"
        for module, imported in ARROWS
        if module.room in ORDER  # the front door and the command line see every room
        and (room := room_of(imported.module)) is not None
        and ORDER.index(room) < ORDER.index(module.room)
    ]
    assert not broken


@pytest.mark.parametrize("room", ORDER_INSIDE)
def test_imports_inside_a_room_point_one_way(room):
    order = ORDER_INSIDE[room]
    broken = [
        f"{own} imports {other}"
        for own, others in arrows_inside(f"optalr.{room}").items()
        for other in others
        if {own, other} <= set(order) and order.index(other) < order.index(own)
    ]
    assert not broken


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_round_in_no_circle(folder):
    try:
        graphlib.TopologicalSorter(arrows_inside(folder)).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_module_enters_its_own_room_by_the_front_door():
    broken = [
        f"{module.name} imports {imported}"
        for module, imported in ARROWS
        if module.name.startswith(f"{imported.module}.")
        and not (imported.module == "optalr" and module.room in USERS)
    ]
    assert not broken, "import from the module where it is defined"


def test_a_method_never_imports_another_method():
    for own, others in arrows_inside("optalr.transforms").items():
        assert others <= SHARED, f"{own} imports {others - SHARED}"


# Private names.


def folder_of(name: str) -> str:
    return MODULES[name].folder if name in MODULES else name


def test_no_private_name_is_imported_from_another_folder_or_a_dependency():
    broken = []
    for module, imported in ARROWS:
        parts = str(imported).split(".")
        for depth, part in enumerate(parts):
            if is_private(part) and folder_of(".".join(parts[:depth])) != module.folder:
                broken.append(f"{module.name} imports {imported}")
    assert not broken


def test_no_private_attribute_is_taken_from_another_folder():
    """An attribute ``x._name`` must be assigned or defined somewhere in the folder itself."""
    defined = collections.defaultdict(set)
    private = collections.defaultdict(list)
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined[module.folder].add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined[module.folder].add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined[module.folder].add(node.attr)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                private[module.folder].append((node.attr, f"{module.name}: {ast.unparse(node)}"))
    assert not [
        where
        for folder, uses in private.items()
        for name, where in uses
        if name not in defined[folder]
    ]


# Dependencies.


def test_the_core_needs_only_jax_and_optax():
    broken = [
        f"{module.name} imports {imported}"
        for module in MODULES.values()
        if module.room not in USERS
        for imported in imports(module.name, inside_functions=False)  # those are optional features
        if imported.module.split(".")[0] not in CORE_ALLOWED | STANDARD
    ]
    assert not broken
