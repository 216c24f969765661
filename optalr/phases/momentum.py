"""Handing the momentum of one stage to the next."""

from typing import Any, NamedTuple

import jax

from optalr.states import children, is_named_tuple, settle_like

# The names that optax and optalr give to momentum in a state, in the order of preference: a state
# that has a ``trace`` keeps its velocity there, whatever other running means it has.
_MOMENTUM_FIELDS = ("trace", "momentum", "mu")


def hand_over_momentum(source: Any, target: Any) -> Any:
    """Return the state ``target`` with the momentum that ``source`` holds.

    Momentum is the field ``trace`` of ``optax.trace``, or else ``momentum``, or else ``mu``, the
    running mean of Adam and its relatives. The first such field in the state counts. It is copied
    unchanged.

    Args:
      source: the state that holds the momentum.
      target: the state that receives it.

    Returns:
      A state with the structure, shapes and dtypes of ``target``.

    Raises:
      ValueError: one of the states holds no momentum, or their structures differ.

    Cost: none, or a cast where dtypes differ.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optalr.phases import hand_over_momentum
      >>> params, grads = jnp.zeros(2), jnp.array([1.0, -2.0])
      >>> _, source = optax.trace(0.9).update(grads, optax.trace(0.9).init(params))
      >>> handed = hand_over_momentum(source, optax.sgd(0.1, momentum=0.9).init(params))
      >>> handed[0].trace.tolist()
      [1.0, -2.0]
    """
    moved = _find_momentum(source, "first").momentum
    taken = _find_momentum(target, "second")
    if jax.tree.structure(moved) != jax.tree.structure(taken.momentum):
        raise ValueError(
            "momentum='hand_over' needs momenta of the same structure in both stages. Pass "
            "momentum='restart', or a function of both states."
        )
    replacement = taken.state._replace(**{taken.field: settle_like(moved, taken.momentum)})
    return jax.tree.map(
        lambda node: replacement if node is taken.state else node,
        target,
        is_leaf=lambda node: node is taken.state,
    )


class _Found(NamedTuple):
    """A momentum, and the NamedTuple and field that hold it."""

    state: Any
    field: str
    momentum: Any


def _find_momentum(state: Any, stage: str) -> _Found:
    """Return the first momentum in ``state``, searched level by level; ``stage`` names it."""
    for field in _MOMENTUM_FIELDS:
        pending = [state]
        while pending:
            node = pending.pop(0)
            if is_named_tuple(node) and field in node._fields:
                return _Found(node, field, getattr(node, field))
            pending.extend(child for _, child in children(node))
    raise ValueError(
        f"momentum='hand_over' needs a momentum in both stages, and the {stage} stage's state has "
        "none. Add optax.trace to it, or pass momentum='restart'."
    )
