"""Trees that lack some leaves of the parameters, as under ``optax.masked`` and ``partition``.

Curvature products and losses are functions of all parameters, while a method may see only some.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.linalg.minres.vectors import cast_like
from optalr.signals.ray import by_path


def restrict(product: Callable[[Any], Any], updates: Any, point: Any) -> Callable[[Any], Any]:
    """Return ``product`` as a map of trees like ``updates``, which may lack masked leaves.

    Args:
      product: a linear map of trees like ``point``.
      updates: a tree with some or all leaves of ``point``.
      point: the parameters, or None where ``updates`` has all of them.

    Raises:
      ValueError: ``updates`` holds leaves that ``point`` lacks.
    """
    if point is None or jax.tree.structure(point) == jax.tree.structure(updates):
        like = updates if point is None else point
        return lambda v: product(cast_like(v, like))
    places, known = set(by_path(updates)), set(by_path(point))
    if not places <= known:
        raise ValueError(
            f"updates hold leaves that extras['point'] lacks: {sorted(places - known)}. Pass the "
            "extras of the parameters that are being updated."
        )

    # By key path: masking leaves holes in the structure, so that leaves cannot be paired in order.
    def restricted(v: Any) -> Any:
        found = by_path(product(embed(v, point)))
        return jax.tree_util.tree_map_with_path(
            lambda path, _: found[jax.tree_util.keystr(path)], v
        )

    return restricted


def embed(v: Any, point: Any) -> Any:
    """Return ``v`` in the structure and dtypes of ``point``, zero where ``v`` has no leaf."""
    found = by_path(v)

    def leaf(path: Any, p: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return found[name].astype(p.dtype) if name in found else jnp.zeros_like(p)

    return jax.tree_util.tree_map_with_path(leaf, point)
