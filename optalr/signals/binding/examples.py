"""A batch without examples or positions, refused by the names of its arrays.

In: a loss and its further arguments. Out: nothing, or an error that says which of them is empty.
jax takes the mean of nothing for NaN, and moments of nothing have no shape that fits.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.binding.bound import is_array

_REMEDY = "Skip an empty batch: there is nothing to learn from."


def refuse_if_all_empty(loss_fn: Callable[..., Any], args: Any, arrays: Any) -> None:
    """Raise if there is data, and none of it has an element: nothing needs to be traced for that.

    Args:
      loss_fn: the loss.
      args: its arguments after the parameters.
      arrays: all arrays that it gets, those that it holds included.

    Raises:
      ValueError: the batch is empty.
    """
    # An empty array beside a full one may be what a loss takes for "none", and with a key a loss
    # may draw its data. What is empty then shows in the layers.
    sizes = [
        1 if _is_key(array) else array.size for array in arrays if array.ndim or _is_key(array)
    ]
    if sizes and not any(sizes):
        raise refusal(loss_fn, args)


def refusal(loss_fn: Callable[..., Any], args: Any) -> ValueError:
    """Return the error that names the arrays of a batch that are empty."""
    empty = [
        f"{name} has shape {tuple(a.shape)}" for name, a in _named(loss_fn, args) if not a.size
    ]
    found = ", ".join(empty) or "a layer gets none"
    return ValueError(f"the batch holds no examples or positions: {found}. {_REMEDY}")


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _named(loss_fn: Callable[..., Any], args: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays among a loss's arguments, with names as its author knows them."""
    given = {**dict(zip(_positional(loss_fn, len(args)), args, strict=True)), **_keywords(loss_fn)}
    for name, value in given.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            if is_array(leaf):
                yield f"{name}{jax.tree_util.keystr(path)}", leaf


def _positional(loss_fn: Callable[..., Any], number: int) -> list[str]:
    """Return the names of the arguments after the parameters; ``args[i]`` where it has none."""
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return [names[i] if i < len(names) else f"args[{i}]" for i in range(number)]


def _keywords(loss_fn: Callable[..., Any]) -> dict[str, Any]:
    return loss_fn.keywords if isinstance(loss_fn, functools.partial) else {}
