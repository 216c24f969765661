"""A test that asserts nothing passes whatever happens: none may stand in the suite."""

import ast
import functools
import pathlib
from collections.abc import Iterator

TESTS = pathlib.Path(__file__).parent
# What asserts without the word, where a dotted name begins so or is so.
ASSERTING = ("assert", "pytest.raises", "pytest.warns", "pytest.fail", "jax.test_util.check_grads")


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(TESTS)): ast.parse(path.read_text()) for path in TESTS.rglob("*.py")
    }


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def calls(function: ast.FunctionDef) -> set[str]:
    return {ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}


def names(function: ast.FunctionDef) -> set[str]:
    """Return the bare names that a function mentions: a helper may be mapped over a tree."""
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} | {
        call.rpartition(".")[2] for call in calls(function)
    }


def asserts_itself(function: ast.FunctionDef) -> bool:
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    mentioned = {ast.unparse(n) for n in ast.walk(function) if isinstance(n, ast.Attribute)}
    return any(
        name.startswith(ASSERTING) or name.rpartition(".")[2].startswith("assert_")
        for name in mentioned | calls(function)
    )


def asserting_helpers() -> set[str]:
    """Return the names of the suite's helpers that assert."""
    return {
        function.name
        for tree in trees().values()
        for function in functions(tree)
        if not function.name.startswith("test_") and asserts_itself(function)
    }


def test_every_test_asserts_something():
    helpers = asserting_helpers()
    assert not [
        f"{path}::{function.name}"
        for path, tree in trees().items()
        for function in functions(tree)
        if function.name.startswith("test_")
        and not asserts_itself(function)
        and not names(function) & helpers
    ]
