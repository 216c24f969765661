"""The layout is the architecture: imports point one way, and stay on public interfaces."""

import ast
import pathlib
import sys

import pytest

import optalr

PACKAGE = pathlib.Path(optalr.__file__).parent
# A room may import itself and every room named after it on this list.
ORDER = ["experiments", "adapters", "rate_suggestion", "monitoring", "recipes", "diagnostics",
         "geometry", "phases", "transforms", "resuming", "schedules", "decay_profiles",
         "states", "signals", "linalg", "arguments"]  # fmt: skip
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


def test_a_method_never_imports_another_method():
    methods = {p.stem for p in (PACKAGE / "transforms").glob("*.py") if not p.stem.startswith("_")}
    for path in (PACKAGE / "transforms").glob("*.py"):
        if path.stem in ("__init__",) or path.stem.startswith("_"):
            continue
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[:2] == ["optalr", "transforms"] and len(parts) > 2:
                assert parts[2] not in methods - {path.stem}, f"{path.name} imports {module}"


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
