"""A function with its arguments, split into what a compiled program holds and what it is given.

In: a function and arguments of any kind. Out: a ``Bound``, which is static, and arrays.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from optalr.signals.binding.closures import Closure, take_apart


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A function with its arguments, both split into arrays, given later, and the rest, kept here.

    Equal bindings compare equal, so a ``Partial`` of one crosses ``jit`` without a retrace.

    Attributes:
      function: the function.
      closure: the function but for the arrays that it holds; None where it cannot be taken apart.
      treedef: the structure of the arguments.
      kept: the leaves of the arguments, with a mark in place of each array.
    """

    function: Callable[..., Any]
    closure: Closure | None
    treedef: Any
    kept: tuple[Any, ...]

    @property
    def places(self) -> tuple[str, ...]:
        """Where the function holds arrays."""
        return self.closure.places if self.closure is not None else ()

    def opened(self, arrays: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the function and its arguments, with the arrays put back."""
        held, remaining = arrays[: len(self.places)], iter(arrays[len(self.places) :])
        function = self.closure.function(held) if held and self.closure else self.function
        leaves = [next(remaining) if kept is _ARRAY else kept for kept in self.kept]
        return function, jax.tree.unflatten(self.treedef, leaves)

    def __call__(self, arrays: Sequence[Any], *first: Any) -> Any:
        """Return the function's value on ``first`` and its bound arguments."""
        function, args = self.opened(arrays)
        return function(*first, *args)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bound):
            return NotImplemented
        if (self.places, self.treedef, self.kept) != (other.places, other.treedef, other.kept):
            return False
        # One object is one function, even if a list that it appends to has grown.
        if self.function == other.function:
            return True
        return self.closure is not None and self.closure == other.closure

    def __hash__(self) -> int:
        return hash((self.places, self.treedef, self.kept))


def bind(
    function: Callable[..., Any], args: Any, *, apart: bool = True
) -> tuple[Bound, tuple[Any, ...]]:
    """Return a function with its arguments bound, and the arrays that it is then called on.

    Args:
      function: the function.
      args: its arguments, after those that it is called on.
      apart: whether to look for arrays in the function as well.
    """
    leaves, treedef = jax.tree.flatten(args)
    kept = tuple(_ARRAY if is_array(leaf) else leaf for leaf in leaves)
    arrays = tuple(leaf for leaf in leaves if is_array(leaf))
    closure, held = (take_apart(function) if apart else None) or (None, ())
    return Bound(function, closure, treedef, kept), (*held, *arrays)


def is_array(leaf: Any) -> bool:
    """Return whether an argument is an array, or the shape of one."""
    # Python numbers are no arrays here: a loss may branch on a bool that it is given.
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


class _Array:
    """Marks the place of an array among the kept arguments."""

    def __repr__(self) -> str:
        return "<array>"


_ARRAY = _Array()
