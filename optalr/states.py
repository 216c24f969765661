"""Walking optimizer states of any nesting, through whatever wrappers hold them."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, child)`` for the direct children of a pytree node; none for a leaf."""
    entries, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    for path, child in entries:
        if path:
            yield jax.tree_util.keystr(path, simple=True), child


def is_named_tuple(node: Any) -> bool:
    """Tell whether ``node`` is a NamedTuple, as the states of optax and optalr are."""
    return isinstance(node, tuple) and hasattr(node, "_fields")


def injects(node: Any, name: str) -> bool:
    """Tell whether ``node`` is a state of ``optax.inject_hyperparams`` that holds ``name``."""
    return is_named_tuple(node) and name in (getattr(node, "hyperparams", None) or {})


def settle(tree: Any) -> Any:
    """Return ``tree`` with arrays for leaves, none of them weakly typed."""
    return jax.tree.map(_strong, tree)


def settle_like(tree: Any, reference: Any) -> Any:
    """Return ``tree`` with each leaf in the dtype of the same leaf of ``reference``."""
    return jax.tree.map(lambda x, like: _strong(jnp.asarray(x).astype(like.dtype)), tree, reference)


def count_up(count: jax.Array) -> jax.Array:
    """Return ``count + 1``, or ``count`` where that would overflow."""
    limit = jnp.iinfo(count.dtype).max
    return jnp.where(count < limit, count + 1, limit)


def _strong(leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return array  # random keys: never weak, and not to be converted
    return jax.lax.convert_element_type(array, array.dtype)
