"""What every room needs to know of arrays: whether they are finite, and wide enough for sums."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding


def all_finite(tree: Any) -> jax.Array:
    """Return whether every number of a pytree is finite; True for a tree without leaves."""
    parts = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(parts).all() if parts else jnp.bool_(True)


def wide_dtype(*values: Any) -> Any:
    """Return the dtype that holds all of ``values`` (arrays or dtypes), float32 or wider.

    Half precision is for storage only. In bfloat16 a sum stops growing once it is 256 times a term,
    and a decay of 0.999 rounds to 1.
    """
    return jnp.promote_types(jnp.result_type(*values), jnp.float32)


def at_least_float32(tree: Any) -> Any:
    """Return a pytree with its floating leaves in float32 or wider, and all others as they are."""

    def widen(leaf: Any) -> Any:
        return leaf.astype(wide_dtype(leaf)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(widen, tree)


def as_inexact(tree: Any) -> Any:
    """Return a pytree of arrays, none weakly typed, with integers and bools in floating point.

    optax's rules make floats of them too. In their own dtype a step would be rounded to zero.
    """

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        array = jnp.asarray(leaf)
        inexact = jnp.issubdtype(array.dtype, jnp.inexact)
        # Weak types end here: zeros like a weakly typed array lose its sharding.
        return jax.lax.convert_element_type(array, array.dtype if inexact else wide_dtype(array))

    return jax.tree.map(convert, tree)


def moving_average(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    """Return ``decay · old + (1 − decay) · new``, in the dtype of the old."""
    decay = jnp.asarray(decay, old.dtype)
    return decay * old + (1 - decay) * new.astype(old.dtype)


def as_vector(parts: Sequence[Any]) -> jax.Array:
    """Return the numbers of several arrays as one vector."""
    return jnp.concatenate([jnp.ravel(part) for part in parts])


def like_parts(
    vector: jax.Array, parts: Sequence[Any], stacks: Sequence[tuple[int, ...]]
) -> list[jax.Array]:
    """Undo ``as_vector``, where each of several arrays has one number an entry of its stack axes.

    Args:
      vector: the numbers of all arrays.
      parts: arrays, or shapes and dtypes.
      stacks: the sizes of each array's leading stack axes.

    Returns:
      Arrays of the shapes of ``parts``, in which the other axes repeat the numbers.
    """
    ends = np.cumsum([math.prod(stack) for stack in stacks])
    pieces = jnp.split(vector, ends[:-1])
    return list(map(repeated, pieces, parts, stacks))


def repeated(numbers: jax.Array, like: Any, stack: tuple[int, ...]) -> jax.Array:
    """Return a vector with an entry for each of an array's stack axes, in the array's shape."""
    if not like.shape:
        return numbers.reshape(())
    if len(stack) > 1:
        numbers = numbers.reshape(stack)
    # One number without a stack axis repeats along all axes, as it would alone.
    return jax.lax.broadcast_in_dim(numbers, like.shape, tuple(range(max(len(stack), 1))))


def diagonal(matrices: jax.Array) -> jax.Array:
    """Return the diagonals of square matrices, ``(..., n)``, by one slice with a stride.

    ``jnp.diagonal`` gathers, and holds a branch for each kind of device.
    """
    *stack, _, n = matrices.shape
    return jax.lax.slice_in_dim(matrices.reshape(*stack, n * n), 0, n * n, n + 1, axis=-1)


def power_of_two_below(numbers: jax.Array) -> jax.Array:
    """Return the largest power of two that each float32 or float64 >= 0 holds; 0 below 2^-126.

    Its bits are those of the exponent, which takes fewer operations than ``jnp.frexp``.
    """
    whole, mask = (
        (jnp.int64, 0x7FF << 52) if numbers.dtype.itemsize == 8 else (jnp.int32, 0xFF << 23)
    )
    bits = jax.lax.bitcast_convert_type(numbers, whole)
    return jax.lax.bitcast_convert_type(bits & mask, numbers.dtype)


def damped_power(values: jax.Array, damping: Any, power: Any) -> jax.Array:
    """Return ``(values + damping)^power``, and 1 where the base is not positive."""
    base = values + damping
    safe = jnp.where(base > 0, base, 1)
    return jnp.where(base > 0, jnp.power(safe, jnp.asarray(power, values.dtype)), 1)


def on_auto_axes(function: Callable[..., Any], *args: Any, like: Any) -> Any:
    """Return ``function(*args)``, computed with shardings of the compiler's choice.

    On a mesh with explicit axes every operation must say how its result is sharded. What contracts,
    reshapes or decomposes arrays of any sharding cannot. Elsewhere this is a plain call.

    Args:
      function: it must not call functions of the user, who may write for explicit axes.
      *args: pytrees.
      like: a tree of the result's structure. Each array of the result is sharded as that of
        ``like``; where that is a shape without a sharding, it is replicated.
    """
    leaves, treedef = jax.tree.flatten(args)
    known = [explicit_sharding(leaf) for leaf in leaves]
    meshes = [sharding.mesh for sharding in known if sharding is not None]
    if not meshes:
        return function(*args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

    def of_arrays(arrays: Sequence[Any]) -> Any:
        filled = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        return function(*jax.tree.unflatten(treedef, filled))

    replicated = jax.sharding.PartitionSpec()
    specs = jax.tree.map(lambda x: getattr(explicit_sharding(x), "spec", replicated), like)
    # Without jax.set_mesh the arrays alone know the mesh.
    is_set = not jax.sharding.get_abstract_mesh().empty
    with nullcontext() if is_set else jax.sharding.use_abstract_mesh(meshes[0]):
        on_arrays = jax.sharding.auto_axes(of_arrays, out_sharding=specs)
        return on_arrays([leaves[i] for i in places])


def explicit_sharding(leaf: Any) -> Any:
    """Return the sharding of an array, or shape, on a mesh with explicit axes, else None."""
    if isinstance(leaf, jax.ShapeDtypeStruct) and isinstance(leaf.sharding, NamedSharding):
        sharding = leaf.sharding
    elif isinstance(leaf, jax.Array):
        sharding = jax.typeof(leaf).sharding
    else:
        return None
    return sharding if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else None
