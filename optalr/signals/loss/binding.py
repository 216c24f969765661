"""A function with its arguments bound, so that it may cross a ``jit`` boundary.

In: a function and its arguments. Out: a ``Bound``, which is static, and the arrays, which are not.
Both together make a ``jax.tree_util.Partial`` that a compiled program takes as an argument. A plain
closure over the arrays would be a new constant, and so a new compilation, at every step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function with its arguments split into arrays, given later, and the rest, kept here.

    Equal bindings compare equal, so a ``Partial`` of one crosses ``jit`` without a retrace.

    Attributes:
      function: the function.
      treedef: the structure of the arguments.
      kept: the leaves of the arguments, with a mark in place of each array.
    """

    function: Callable[..., Any]
    treedef: Any
    kept: tuple[Any, ...]

    def args(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Put the arrays back among the arguments that were kept."""
        remaining = iter(arrays)
        leaves = [next(remaining) if kept is _ARRAY else kept for kept in self.kept]
        return jax.tree.unflatten(self.treedef, leaves)

    def __call__(self, arrays: Sequence[Any], *first: Any) -> Any:
        """Return the function's value on ``first`` and its bound arguments."""
        return self.function(*first, *self.args(arrays))


def bind(function: Callable[..., Any], args: Any) -> tuple[Bound, tuple[Any, ...]]:
    """Return a function with its arguments bound, and the arrays that it is then called on."""
    leaves, treedef = jax.tree.flatten(args)
    kept = tuple(_ARRAY if is_array(leaf) else leaf for leaf in leaves)
    return Bound(function, treedef, kept), tuple(leaf for leaf in leaves if is_array(leaf))


def is_array(leaf: Any) -> bool:
    """Return whether an argument is an array, or the shape of one."""
    # Python numbers are no arrays here: a loss may branch on a bool that it is given.
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


class _Array:
    """Marks the place of an array among the kept arguments."""

    def __repr__(self) -> str:
        return "<array>"


_ARRAY = _Array()
