"""The package read as syntax trees: its modules, what they import, how long they are.

Nothing is imported here, so the rules that stand on this module hold for broken code as well.
"""

import ast
import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.reading_cost import code_lines

ROOT = pathlib.Path(__file__).parents[1]


class Module(NamedTuple):
    """One file of the package.

    Attributes:
      name: as it is imported; a folder's ``__init__`` has the folder's name.
      path: the file.
      tree: its syntax tree.
      code: numbers of the lines that are neither blank nor comment nor docstring.
    """

    name: str
    path: pathlib.Path
    tree: ast.Module
    code: frozenset[int]

    @property
    def is_door(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        return self.name if self.is_door else self.name.rpartition(".")[0]

    @property
    def room(self) -> str | None:
        return room_of(self.name)


class Import(NamedTuple):
    """One imported name: ``module`` is the module it comes from, ``name`` what is taken of it.

    ``name`` is None where the module itself is imported, ``alias`` is what it is called there.
    """

    module: str
    name: str | None
    alias: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


class Function(NamedTuple):
    """One function or method: ``name`` with its module and class; ``num_lines`` of its code."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    num_lines: int

    @property
    def positional(self) -> list[str]:
        arguments = self.node.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        return [name for name in names if name not in ("self", "cls")]


def room_of(module: str) -> str | None:
    """Return the part after ``optalr`` of a module's name; None for what is not of the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "optalr" else None


@functools.cache
def package() -> dict[str, Module]:
    """Return every module of the package by its name."""
    modules = {}
    for path in sorted((ROOT / "optalr").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text()
        modules[name] = Module(name, path, ast.parse(source), code_lines(source))
    return modules


@functools.cache
def imports(module: str, *, inside_functions: bool = True) -> tuple[Import, ...]:
    """Return what a module imports at its top level and, unless told otherwise, in functions."""
    tree = package()[module].tree
    found = []
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            found += [Import(alias.name, None, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                full, called = f"{node.module}.{alias.name}", alias.asname or alias.name
                known = full in package()
                found.append(
                    Import(full if known else node.module, None if known else alias.name, called)
                )
    return tuple(found)


def public_definitions(room: str) -> list[str]:
    """Return the dotted names of what the modules of a room define for its users."""
    return [
        f"{module.name}.{node.name}"
        for module in package().values()
        if module.room == room
        for node in module.tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def functions(module: Module, *, nested: bool = True) -> Iterator[Function]:
    """Yield the functions of a module; those inside functions only where ``nested`` is set."""

    def visit(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}.{child.name}"
                lines = range(child.lineno, (child.end_lineno or child.lineno) + 1)
                yield Function(name, child, len(module.code.intersection(lines)))
                if nested:
                    yield from visit(child, name)
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}.{child.name}")
            else:
                yield from visit(child, prefix)

    return visit(module.tree, module.name)
