"""Momentum that one stage hands to the next."""

from typing import Any, NamedTuple

import jax

from optalr.states import children, is_named_tuple, settle_like

_MOMENTUM_FIELDS = ("trace", "momentum", "mu")


def hand_over_momentum(source: Any, target: Any) -> Any:
    """Return the state ``target`` with the momentum that ``source`` holds.

    Momentum is the field ``trace`` of ``optax.trace``, or else ``momentum``, or else ``mu``, the
    running mean of Adam and its kin; the first in the state. It is copied as it is.

    Raises:
      ValueError: either state holds no momentum, or the two do not match.
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
    state: Any
    field: str
    momentum: Any


def _find_momentum(state: Any, stage: str) -> _Found:
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
