"""Loading optimizer states that an older release saved."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.transforms.kronecker.transform import KroneckerState

# A way to an array: the names on it, as they are written in nested dicts.
_Names = tuple[str, ...]

# The names of ``KroneckerState.memory``'s parts until 0.1, when each was a field of the state.
_OLD_SIDES = {"rows": "row", "cols": "col"}
_OLD_PARTS = {"factor": "factors", "root": "roots", "eigenvalues": "eigenvalues", "basis": "bases"}


def upgrade_state(saved: Any, like: Any) -> Any:
    """Return a state that an older optalr saved, in the form that this one uses.

    Choose it where restoring a checkpoint fails because the fields of a state have new names or
    places. It changes no number: training goes on where it stopped. It compares every array's place
    and shape, so it is also a loader that refuses the state of other options.

    Args:
      saved: the old state as nested dicts and lists, which is what Orbax restores without a target,
        ``flax.serialization.msgpack_restore`` returns, and ``flax.serialization.to_state_dict``
        makes. A state in today's form is accepted too.
      like: a state of the same transformation and parameters, from ``tx.init(params)``, or its
        shapes from ``jax.eval_shape``.

    Returns:
      A state of the structure of ``like``.

    Raises:
      ValueError: ``saved`` lacks an array, has one of another shape, or has one that ``like`` has
        no place for (it is of another ``spectrum``, say); the message names it.

    Cost: a copy of the state.

    Examples:
      >>> import flax.serialization, jax.numpy as jnp, optalr
      >>> tx = optalr.tso_alra(1e-2)
      >>> state = tx.init({"w": jnp.ones((3, 2))})
      >>> saved = flax.serialization.to_state_dict(state)  # as an older release saved it
      >>> restored = optalr.upgrade_state(saved, tx.init({"w": jnp.ones((3, 2))}))
      >>> type(restored) is type(state)
      True
    """

    def is_kronecker(node: Any) -> bool:
        return isinstance(node, KroneckerState)

    nodes, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_kronecker)
    upgraded, read = [], set()

    def take(way: Sequence[Any], leaf: Any) -> jax.Array:
        read.add(_names(way))
        return _take(saved, way, leaf)

    for way, node in nodes:
        if not is_kronecker(node):
            upgraded.append(take(way, node))
            continue
        leaves, inner = jax.tree_util.tree_flatten_with_path(node)
        places = [(way + below, way + _old_place(below), leaf) for below, leaf in leaves]
        arrays = [take(old if _is_old(saved, new, old) else new, leaf) for new, old, leaf in places]
        upgraded.append(jax.tree.unflatten(inner, arrays))
    _refuse_unread(saved, read)
    return jax.tree.unflatten(structure, upgraded)


def _old_place(way: Sequence[Any]) -> tuple[Any, ...]:
    """Return the path in a state of 0.1 to what is at the path ``way`` now."""
    names = [_name(key) for key in way[:3]]
    if names[0] != "memory":
        return tuple(way)
    if names[1] in _OLD_SIDES:
        return (_attribute(f"{_OLD_SIDES[names[1]]}_{_OLD_PARTS[names[2]]}"), *way[3:])
    return (_attribute("second_moments"), *way[2:])


def _attribute(name: str) -> Any:
    return jax.tree_util.GetAttrKey(name)


def _name(key: Any) -> str:
    """Return a key as it is written in nested dicts: field, dict key or position."""
    return jax.tree_util.keystr((key,), simple=True)


def _names(way: Sequence[Any]) -> _Names:
    return tuple(map(_name, way))


def _child(node: Any, key: Any) -> Any:
    """Return the child of a node of any kind, or None."""
    name = _name(key)
    if isinstance(node, Mapping):
        return node.get(getattr(key, "key", name), node.get(name))
    if hasattr(node, name):
        return getattr(node, name)
    if isinstance(node, list | tuple) and name.isdecimal() and int(name) < len(node):
        return node[int(name)]
    return None


def _find(saved: Any, way: Sequence[Any]) -> Any:
    for key in way:
        saved = _child(saved, key)
    return saved


def _is_old(saved: Any, new: Sequence[Any], old: Sequence[Any]) -> bool:
    """Return whether ``saved`` has an array at its old place only."""
    return _find(saved, new) is None and _find(saved, old) is not None


def _refuse_unread(saved: Any, read: set[_Names]) -> None:
    """Raise if ``saved`` has an array that was not read."""
    for way, leaf in jax.tree_util.tree_leaves_with_path(saved):
        if _names(way) not in read:
            raise ValueError(
                f"saved has {jax.tree_util.keystr(way)} of shape {jnp.shape(leaf)}, for which like "
                "has no place. It is of other options (another spectrum or root_method, say), of "
                "another transformation or of other parameters. Pass like=tx.init(params) of those "
                "that were saved."
            )


def _take(saved: Any, way: Sequence[Any], like: Any) -> jax.Array:
    name = jax.tree_util.keystr(tuple(way))
    found = _find(saved, way)
    if found is None:
        raise ValueError(
            f"saved has no {name}. It is of other options (another spectrum or root_method, say), "
            "of another transformation, of other parameters, or of a release that upgrade_state "
            "does not know. Pass like=tx.init(params) of those that were saved, or start anew."
        )
    if jnp.shape(found) != jnp.shape(like):
        raise ValueError(
            f"saved has {name} of shape {jnp.shape(found)}, and like has {jnp.shape(like)}. Pass "
            "like=tx.init(params) of the options and the parameters that were saved."
        )
    return jnp.asarray(found, like.dtype)
