"""Walking optimizer states of any nesting, and changing them in place."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arguments import shown


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, child)`` for the direct children of a pytree node; none for a leaf."""
    entries, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    for path, child in entries:
        if path:
            yield jax.tree_util.keystr(path, simple=True), child


def check_opt_state(opt_state: Any) -> None:
    """Raise ``TypeError`` where a transformation was passed for its state: it reports nothing."""
    if hasattr(opt_state, "init") and hasattr(opt_state, "update"):
        raise TypeError(
            "opt_state must be an optimizer's state, got the transformation itself. Pass what "
            "tx.init(params) or tx.update(...) returned."
        )


def check_state(method: str, state: Any, fits: bool) -> None:
    """Raise ``TypeError`` where what stands for a state is of another kind than the method's.

    Args:
      method: the transformation, as the user wrote it.
      state: what ``update`` got.
      fits: whether it is of the kind that ``init`` returns.
    """
    if not fits:
        raise TypeError(
            f"{method}: state must be what its tx.init(params) returned, got {shown(state)}. The "
            "order is tx.update(grads, state, params, **extras). A checkpoint is restored into the "
            "structure of tx.init(params)."
        )


def is_named_tuple(node: Any) -> bool:
    """Return whether ``node`` is a NamedTuple, as the states of optax and optalr are."""
    return isinstance(node, tuple) and hasattr(node, "_fields")


def injects(node: Any, name: str) -> bool:
    """Return whether ``node`` is a state of ``optax.inject_hyperparams`` that holds ``name``."""
    return is_named_tuple(node) and name in (getattr(node, "hyperparams", None) or {})


def is_box(node: Any) -> bool:
    """Return whether ``node`` is an array, or the place of one, in a box with metadata.

    Such are the axis names of flax linen's ``with_partitioning`` and the variables of nnx. They are
    told by their methods, so that nothing here imports flax.
    """
    kind = type(node)
    linen = hasattr(kind, "unbox") and hasattr(kind, "replace_boxed")
    nnx = hasattr(kind, "get_metadata") and hasattr(kind, "get_value")
    return (linen or nnx) and jax.tree.structure(node).num_leaves <= 1


def unboxed(tree: Any) -> Any:
    """Return ``tree`` without boxes, its leaves in the same order.

    Metadata speak of the axes of a parameter. Nothing of another shape may sit in its box.
    """

    # Not by the box's own unbox, which also constrains the sharding of what it returns.
    def content(node: Any) -> Any:
        inside = [child for _, child in children(node)] if is_box(node) else []
        return unboxed(inside[0]) if len(inside) == 1 else node

    return jax.tree.map(content, tree, is_leaf=is_box)


def boxed_like(leaves: Sequence[Any], tree: Any) -> list[Any]:
    """Return each leaf in the box of the same leaf of ``tree``, where that has one.

    Args:
      leaves: what stands for the leaves of ``tree``; one that is no array stays as it is.
      tree: a pytree.
    """
    shells = map(jax.tree.structure, jax.tree.leaves(tree, is_leaf=is_box))
    shells = [shell for shell in shells if shell.num_leaves]
    return [
        shell.unflatten([leaf]) if hasattr(leaf, "dtype") else leaf
        for leaf, shell in zip(leaves, shells, strict=True)
    ]


def settle(tree: Any) -> Any:
    """Return ``tree`` with arrays for leaves, none of them weakly typed.

    A weak type would become strong after the first update, and the step be compiled twice.
    """
    return jax.tree.map(_strong, tree)


def settle_like(tree: Any, reference: Any) -> Any:
    """Return ``tree`` with each leaf in the dtype of the same leaf of ``reference``."""
    return jax.tree.map(lambda x, like: _strong(jnp.asarray(x).astype(like.dtype)), tree, reference)


def count_up(count: jax.Array, by: Any = 1) -> jax.Array:
    """Return ``count + by`` for ``by >= 0``, or the largest integer where that would overflow.

    A counter that wraps round would be negative: a failure count that hides failures, a step count
    that starts a schedule, or a phase, anew.
    """
    limit, by = jnp.iinfo(count.dtype).max, jnp.asarray(by)
    if by.dtype == jnp.bool_:
        return count + (by & (count < limit)).astype(count.dtype)
    # In place of a sum and a select: few operations, for what every update does to many counters.
    by = by.astype(count.dtype)
    return jnp.minimum(count, limit - by) + by


def update_when(
    condition: jax.Array, update: Callable[[Any, Any], Any], state: Any, inputs: Any
) -> Any:
    """Return ``update(state, inputs)`` where ``condition`` holds, else ``state``, left in place.

    ``jax.lax.cond`` computes the same, but XLA copies what passes through a conditional unchanged,
    and a donated state twice. For a preconditioner these are all factors, in every step of a phase
    that does not touch them. A loop of at most one turn leaves a donated state where it is. It
    cannot be differentiated in reverse mode.

    Args:
      condition: boolean scalar.
      update: a function that keeps structure, shapes and dtypes of ``state``.
      state: a pytree of arrays. What ``update`` returns as it was is left in place too.
      inputs: a pytree of all else that ``update`` reads. Leaves that are not arrays are passed on
        as they are. All arrays, also those of ``state``, are tied to the loop's counter, so that no
        compiler moves work on those that stay the same out of the loop.

    Returns:
      A pytree with structure, shapes and dtypes of ``state``.
    """

    def turn(carry: Any) -> Any:
        pending, current = carry

        def tie(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array | np.ndarray):
                return leaf
            return jax.lax.optimization_barrier((leaf, pending))[0]

        # One barrier per leaf, so that a leaf that update does not read can still be pruned.
        tied = jax.tree.map(tie, current), jax.tree.map(tie, inputs)
        return jnp.zeros_like(pending), update(*tied)

    return jax.lax.while_loop(lambda carry: carry[0], turn, (condition, state))[1]


def _strong(leaf: Any) -> jax.Array:
    """Return the leaf as an array that is not weakly typed."""
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return array  # random keys are never weak and cannot be converted
    return jax.lax.convert_element_type(array, array.dtype)
