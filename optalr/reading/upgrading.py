"""Loading optimizer states that an older release saved."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

# A way to an array: the names on it, as they are written in nested dicts.
_Names = tuple[str, ...]

# The names of ``KroneckerState.memory``'s parts until 0.1, when each was a field of the state.
_OLD_SIDES = {"rows": "row", "cols": "col"}
_OLD_PARTS = {"factor": "factors", "root": "roots", "eigenvalues": "eigenvalues", "basis": "bases"}
# Fields that states have gained since, and the number that they begin with.
_GAINED = MappingProxyType(
    {
        "gradients": 0,
        "watch": 0,
        "bounded_steps": 0,
        "failures": 0,
        "alignment": 0,
        "gradient_norm": 0,
        "missed": 0,
        "gain": 1,
    }
)
# Fields that say how the transformation was configured. They are those of the state at hand, and
# -1, which the next update replaces, where that is known by its shapes alone.
_CONFIGURED = frozenset({"told", "period", "periods", "hands_over", "start", "end"})
# Flags that say what NaN said in another field, which is 0 now.
_FLAGS = MappingProxyType({"started": "first_value", "overridden": "override"})
_MARKED = frozenset(_FLAGS.values())


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
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    upgraded, read = [], set()
    for way, leaf in leaves:
        place = next((each for each in _places(way) if _has(saved, each)), None)
        if place is None:
            upgraded.append(_gained(saved, way, leaf))
            continue
        read.add(_names(place))
        found = _take(saved, place, leaf)
        if _name(way[-1]) in _MARKED:
            found = jnp.where(jnp.isnan(found), 0, found)
        upgraded.append(found)
    _refuse_unread(saved, read)
    return jax.tree.unflatten(structure, upgraded)


def _places(way: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the paths in today's state and in older ones to what is at the path ``way`` now."""
    yield tuple(way)
    names = _names(way)
    for i, name in enumerate(names):
        if name == "memory":
            yield (*way[:i], *_old_place(way[i:]))
        # A guard has come around what stood bare.
        if name == "inner_state":
            yield (*way[:i], *way[i + 1 :])


def _old_place(way: Sequence[Any]) -> tuple[Any, ...]:
    """Return the path in a ``KroneckerState`` of 0.1 to what is at the path ``way`` now."""
    side, part = _names(way[1:3]) if len(way) > 2 else ("", "")
    if side in _OLD_SIDES:
        return (_attribute(f"{_OLD_SIDES[side]}_{_OLD_PARTS[part]}"), *way[3:])
    return (_attribute("second_moments"), *way[2:])


def _gained(saved: Any, way: Sequence[Any], leaf: Any) -> jax.Array:
    """Return what a field begins with that the saved state does not have yet."""
    name = _name(way[-1])
    if name in _FLAGS:
        marked = next(
            (p for p in _places((*way[:-1], _attribute(_FLAGS[name]))) if _has(saved, p)), None
        )
        if marked is not None:
            return ~jnp.isnan(jnp.asarray(_find(saved, marked)))
    if not _CONFIGURED.isdisjoint(_names(way)):
        return (
            jnp.array(leaf) if isinstance(leaf, jax.Array) else jnp.full(leaf.shape, -1, leaf.dtype)
        )
    begins = next((_GAINED[each] for each in _names(way) if each in _GAINED), None)
    if begins is None:
        return _take(saved, way, leaf)  # raises, and names the place
    return jnp.full(jnp.shape(leaf), begins, leaf.dtype)


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


def _has(saved: Any, way: Sequence[Any]) -> bool:
    return _find(saved, way) is not None


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
