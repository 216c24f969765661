"""What a compiled step is called with, split into data and what belongs to the program.

In: the arguments of a loss and the extras of an update. Out: what is static of them, a ``Bound``
that compares equal for equal calls, and arrays. So a new batch is no new program.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from optalr.signals.binding.bound import Bound, bind, is_array


def split_call(
    args: tuple[Any, ...], extras: Mapping[str, Any] | None, key: Any
) -> tuple[Bound, tuple[Any, ...]]:
    """Return the static part of a call, and its data.

    Raises:
      TypeError: an argument that is no data cannot be hashed, or ``extras`` is no mapping.
    """
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(f"extras must be a dict of further arguments of tx.update, got {extras!r}.")
    further = jax.tree.map(_extra_as_data, dict(extras or {}), is_leaf=callable)
    given = jax.tree.map(_number_as_data, (args, further, key))
    call, arrays = bind(_nothing, given, apart=False)
    try:
        hash(call)
    except TypeError as error:
        raise TypeError(
            f"step got an argument that is neither an array nor hashable ({error}), so no program "
            "can be made for it. Bind it to the loss by functools.partial."
        ) from error
    return call, arrays


def open_call(call: Bound, arrays: Sequence[Any]) -> Any:
    """Return arguments, extras and key, with the data put back."""
    _, given = call.opened(arrays)
    return given


def _nothing(*_: Any) -> None:
    """Stands for the function of a ``Bound`` of which only the arguments are wanted."""


def _number_as_data(leaf: Any) -> Any:
    """Return a Python number as a weakly typed array, as jax would take it; a bool stays."""
    number = isinstance(leaf, int | float | complex) and not isinstance(leaf, bool)
    return jnp.asarray(leaf) if number and not is_array(leaf) else leaf


def _extra_as_data(extra: Any) -> Any:
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
