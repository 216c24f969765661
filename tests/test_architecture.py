"""The layout is the architecture: imports point one way, and stay on public interfaces."""

import ast
import pathlib
import sys

import pytest

import optalr

PACKAGE = pathlib.Path(optalr.__file__).parent
# A room may import itself and every room named after it on this list.
ORDER = ["experiments", "adapters", "suggestion", "recipes", "reading", "phases", "transforms",
         "schedules", "signals", "linalg", "states", "arrays", "arguments"]  # fmt: skip
CORE_ALLOWED = {"jax", "numpy", "optax", "optalr", "jaxlib"}
STANDARD = frozenset(sys.stdlib_module_names)
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "optalr" else None


def imported_modules(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "optalr":
                yield from (f"optalr.{alias.name}" for alias in node.names)
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_name(path: pathlib.Path) -> str:
    return ".".join(("optalr", *path.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("path", MODULES, ids=own_name)
def test_imports_point_one_way(path):
    own = room_of(own_name(path))
    if own not in ORDER:
        return
    for module in imported_modules(path):
        room = room_of(module)
        if room in ORDER:
            assert ORDER.index(room) >= ORDER.index(own), f"{own_name(path)} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=own_name)
def test_no_private_interface_of_a_dependency(path):
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] != "optalr":
            assert "_src" not in parts, f"{own_name(path)} imports {module}"


def methods_of(path: pathlib.Path) -> tuple[str, ...]:
    """Return the way to a module from its room: a method is a module, or a folder of modules."""
    return path.relative_to(PACKAGE / "transforms").with_suffix("").parts


# What several methods share: no method itself.
SHARED = {"__init__", "shared"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "transforms").rglob("*.py")), ids=own_name)
def test_a_method_never_imports_another_method(path):
    own = methods_of(path)[0]
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[:2] == ["optalr", "transforms"] and len(parts) > 2:
            assert parts[2] in {own, *SHARED}, f"{own_name(path)} imports {module}"


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if room_of(own_name(p)) not in ("experiments", "adapters")],
    ids=own_name,
)
def test_the_core_needs_only_jax_and_optax(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:  # imports inside functions are optional features
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            assert top in CORE_ALLOWED or top in STANDARD, f"{own_name(path)} imports {name}"
