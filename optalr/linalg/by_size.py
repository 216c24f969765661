"""Work on many matrices, those of one size and dtype joined to one stack."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Given, for each size of matrices of one dtype, the parts of what is asked for (arrays with one
# first axis, the first of them ``(k, n, n)``, or None), return for each a pytree of arrays with
# that axis. What is found for a matrix depends on no other matrix.
Solve = Callable[[Sequence[Sequence[Any]]], Sequence[Any]]


def solve_by_size(solve: Solve, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call ``solve`` once, with the requests of each size and dtype joined to one.

    Args:
      solve: as ``Solve`` says.
      requests: tuples of arrays with one first axis, the first of them ``(k, n, n)``; a part that
        is None must be None in all requests of its kind.

    Returns:
      One pytree a request, in the given order.
    """
    results: dict[int, Any] = {}
    of_dtype: dict[Any, list[list[int]]] = {}
    for members in places_by_size(requests):
        of_dtype.setdefault(requests[members[0]][0].dtype, []).append(members)
    for places in of_dtype.values():
        kinds = solve([joined([requests[i] for i in members]) for members in places])
        for members, whole in zip(places, kinds, strict=True):
            sizes = [requests[i][0].shape[0] for i in members]
            results.update(zip(members, _pieces(whole, sizes), strict=True))
    return [results[i] for i in range(len(requests))]


def _pieces(whole: Any, sizes: Sequence[int]) -> list[Any]:
    """Return a pytree's pieces of these sizes, cut along the first axis of its arrays."""
    if len(sizes) == 1:
        return [whole]
    ends = np.cumsum(sizes).tolist()
    places = zip([0, *ends], ends, strict=False)
    return [jax.tree.map(lambda part, a=a, b=b: part[a:b], whole) for a, b in places]


def places_by_size(requests: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    """Return the places of the requests of each size and dtype; see ``solve_by_size``."""
    kinds: dict[Any, list[int]] = {}
    for i, (stack, *_) in enumerate(requests):
        kinds.setdefault((stack.shape[-1], stack.dtype), []).append(i)
    return list(kinds.values())


def joined(requests: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return the parts of requests of one kind, each joined along its first axis."""
    parts = zip(*requests, strict=True)
    return [
        part[0] if part[0] is None or len(part) == 1 else jnp.concatenate(part) for part in parts
    ]
