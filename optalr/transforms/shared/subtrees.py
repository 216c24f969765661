"""Trees that lack some leaves of the parameters, as under ``optax.masked`` and ``partition``.

Curvature products and losses are functions of all parameters, while a method may see only some.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.linalg.minres.vectors import cast_like
from optalr.signals.ray import by_path
from optalr.states import unboxed


def check_places(method: str, updates: Any, point: Any) -> None:
    """Raise unless each leaf of ``updates`` is a leaf of ``point``, by key path and shape.

    Args:
      method: the transformation that reads what was measured at ``point``.
      updates: a tree with some or all leaves of the parameters.
      point: the parameters, or None where they are not known; then nothing is checked.

    Raises:
      ValueError: a wrapper has flattened or renamed the parameters.
    """
    if point is None:
        return
    known = _shapes(point)
    for path, shape in _shapes(updates).items():
        if known.get(path) == shape:
            continue
        found = f"the shape {known[path]}" if path in known else "no such leaf"
        raise ValueError(
            f"updates has the leaf {path or 'updates'} of shape {shape}, where extras['point'] "
            f"has {found}. Pass the extras of the parameters that are updated. If a wrapper such "
            f"as optax.flatten changes leaves, wrap the links after {method} and leave {method} "
            "outside. See docs/wrappers.md."
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(tree))
    return {jax.tree_util.keystr(path): tuple(jnp.shape(leaf)) for path, leaf in leaves}


def restrict(product: Callable[[Any], Any], updates: Any, point: Any) -> Callable[[Any], Any]:
    """Return ``product`` as a map of trees like ``updates``, which may lack masked leaves.

    Args:
      product: a linear map of trees like ``point``.
      updates: a tree with some or all leaves of ``point``.
      point: the parameters, or None where ``updates`` has all of them.

    Raises:
      ValueError: ``updates`` has a leaf that ``point`` lacks, or of another shape.
    """
    check_places("scale_by_krylov_flow", updates, point)
    if point is None or jax.tree.structure(point) == jax.tree.structure(updates):
        like = updates if point is None else point
        return lambda v: product(cast_like(v, like))

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
