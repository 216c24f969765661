"""What a compiled step is called with, split into data and what belongs to the program.

In: the arguments of a loss and the extras of an update. Out: a ``Call``, which is static, and
arrays. Equal calls compare equal, so that a new batch is no new program.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from optalr.signals.binding.bound import Bound, bind, is_array


@dataclasses.dataclass(frozen=True)
class Call:
    """The part of a call that belongs to the program.

    Attributes:
      treedef: the structure of arguments, extras and key together.
      kept: their leaves, with a mark in place of each that is data.
    """

    treedef: Any
    kept: tuple[Any, ...]

    def opened(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Return the arguments, the extras and the key, with the data put back."""
        data = iter(arrays)
        leaves = [next(data) if leaf is _DATA else leaf for leaf in self.kept]
        return jax.tree.unflatten(self.treedef, leaves)


def split_call(
    args: tuple[Any, ...], extras: Mapping[str, Any] | None, key: Any
) -> tuple[Call, list[Any]]:
    """Return the static part of a call, and its data.

    Raises:
      TypeError: an argument that is no data cannot be hashed, or ``extras`` is no mapping.
    """
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(f"extras must be a dict of further arguments of tx.update, got {extras!r}.")
    further = jax.tree.map(_as_data, dict(extras or {}), is_leaf=callable)
    leaves, treedef = jax.tree.flatten((args, further, key))
    kept = tuple(_DATA if _is_data(leaf) else leaf for leaf in leaves)
    for leaf in kept:
        _check_hashable(leaf)
    return Call(treedef, kept), [leaf for leaf in leaves if _is_data(leaf)]


def _as_data(extra: Any) -> Any:
    """Return an extra such that a new value of it is no new program."""
    if isinstance(extra, bool):
        return np.bool_(extra)
    if not callable(extra) or is_array(extra):
        return extra
    # The arrays that a function holds become data: those of a Partial, and those of a closure.
    function, args, keywords = extra, (), {}
    if isinstance(extra, functools.partial):
        function, args, keywords = extra.func, extra.args, extra.keywords
    bound, held = bind(function, ())
    return Partial(_Opened(bound), held, *args, **keywords)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A function that is given the arrays that it holds, before its arguments."""

    bound: Bound

    def __call__(self, held: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        function, _ = self.bound.opened(held)
        return function(*args, **kwargs)


def _is_data(leaf: Any) -> bool:
    number = isinstance(leaf, int | float | complex) and not isinstance(leaf, bool)
    return number or is_array(leaf)


def _check_hashable(leaf: Any) -> None:
    try:
        hash(leaf)
    except TypeError as error:
        raise TypeError(
            f"step got {leaf!r}, which is neither an array nor hashable, so no program can be "
            "made for it. Bind it to the loss by functools.partial."
        ) from error


class _Data:
    """Marks the place of data among the leaves."""

    def __repr__(self) -> str:
        return "<data>"


_DATA = _Data()
