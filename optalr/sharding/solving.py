"""The roots of many matrices, each taken by one device of a mesh.

Without this every device takes every root. Here each takes its share (``owners``), and one
all-gather hands out what all have found:

1. Matrices of one size make a stack, as on one device. Each device cuts its share out of it. No
   matrix is cut itself: every iteration of a root would then wait for other devices.
2. Inside ``jax.shard_map`` a device solves its share, size by size. Devices may have different
   numbers of a size. A program has one text for all, so ``jax.lax.switch`` over the device's place
   chooses among the numbers that occur. These are few, for shares differ by little: a size that all
   have alike needs no switch, three matrices on eight devices need two branches, one of them empty.
   Nothing is solved twice and no stack is padded.
3. What a device has found is one vector, all sizes behind each other. Its length is that of the
   device with the most, so sizes that one device has and another lacks take the same room. All
   devices' vectors are gathered at once, and cut up by the plan.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.linalg import spd
from optalr.sharding.owners import Share, share_out
from optalr.sharding.spread import Spread

Solve = Callable[..., Any]


class _Kind(NamedTuple):
    """All matrices of one size and dtype, and where their solutions lie.

    Attributes:
      parts: the parts of the requests, each joined along its first axis, or None.
      share: which of them each device solves.
      offsets: ``(num_devices,)``, where a device's solutions begin in its vector.
      found: shapes and dtypes of the solution of one matrix, with a first axis of 1.
    """

    parts: tuple[Any, ...]
    share: Share
    offsets: np.ndarray
    found: Any

    @property
    def width(self) -> int:
        """How many numbers the solution of one matrix has."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.found))


def solve_over(
    spread: Spread | None, solve: Solve, requests: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Call ``solve`` for requests of every size, on the device that owns each matrix.

    Args:
      spread: the mesh; None for every matrix on every device.
      solve: takes the parts of a request, joined along their first axis, and returns a pytree of
        arrays with that axis. A matrix's solution depends on no other matrix.
      requests: tuples of arrays with one first axis, the first of them ``(k, n, n)``; a part that
        is None must be None in all requests of its kind.

    Returns:
      One pytree a request, in the given order, on every device. Inside a ``shard_map`` every device
      solves all of them.

    Raises:
      ValueError: ``jax.set_mesh`` was given another mesh.

    Cost: the flops of a device are at most the mean and one matrix, and there is one all-gather.
    """
    mesh = None if spread is None or spread.num_devices == 1 else spread.at_hand()
    if spread is None or mesh is None or not requests:
        return spd.solve_by_size(solve, requests)
    members = spd.places_by_size(requests)
    kinds = _planned(spread, solve, [[requests[i] for i in of_kind] for of_kind in members])
    dtype = jnp.result_type(*(leaf for kind in kinds for leaf in jax.tree.leaves(kind.found)))
    ends = [kind.offsets + kind.share.counts * kind.width for kind in kinds]
    length = int(np.max(ends))

    def of_device(stacks: Sequence[tuple[Any, ...]]) -> jax.Array:
        place, vector = jax.lax.axis_index(spread.names), jnp.zeros(length, dtype)
        for kind, parts in zip(kinds, stacks, strict=True):
            vector = _solve_share(solve, kind._replace(parts=parts), vector, place=place)
        return jax.lax.all_gather(vector, spread.names)

    # What a device has differs from the others', and the loops of a solver need not say so.
    everywhere = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        of_device, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    gathered = mapped([kind.parts for kind in kinds])
    solved: dict[int, Any] = {}
    for kind, of_kind in zip(kinds, members, strict=True):
        sizes = [requests[i][0].shape[0] for i in of_kind]
        solved.update(zip(of_kind, _unpacked(kind, gathered, sizes), strict=True))
    return [solved[i] for i in range(len(requests))]


def _planned(
    spread: Spread, solve: Solve, requests: Sequence[Sequence[tuple[Any, ...]]]
) -> list[_Kind]:
    """Return the kinds of matrices, given the requests of each."""
    stacks = [tuple(spd.joined(each)) for each in requests]
    shapes = [parts[0].shape for parts in stacks]
    shares = share_out([s[-1] for s in shapes], [s[0] for s in shapes], spread.num_devices)
    kinds, offsets = [], np.zeros(spread.num_devices, np.int32)
    for parts, share in zip(stacks, shares, strict=True):
        one = jax.tree.map(
            lambda part: jax.ShapeDtypeStruct((1, *part.shape[1:]), part.dtype), parts
        )
        kind = _Kind(parts, share, offsets, jax.eval_shape(solve, *one))
        kinds.append(kind)
        offsets = offsets + share.counts * kind.width
    return kinds


def _solve_share(solve: Solve, kind: _Kind, vector: jax.Array, *, place: jax.Array) -> jax.Array:
    """Write the solutions of a device's matrices of one kind into its vector."""
    share = kind.share
    numbers, which = np.unique(share.counts, return_inverse=True)

    def solver(number: int) -> Callable[..., jax.Array]:
        def write(vector: jax.Array, start: jax.Array, offset: jax.Array) -> jax.Array:
            if not number:
                return vector
            mine = (
                None if part is None else jax.lax.dynamic_slice_in_dim(part, start, number)
                for part in kind.parts
            )
            leaves = jax.tree.leaves(solve(*mine))
            flat = [leaf.reshape(number, -1).astype(vector.dtype) for leaf in leaves]
            found = jnp.concatenate(flat, 1).reshape(-1)
            return jax.lax.dynamic_update_slice_in_dim(vector, found, offset, 0)

        return write

    start, offset, branch = (
        jnp.asarray(table, jnp.int32)[place] for table in (share.starts, kind.offsets, which)
    )
    branches = [solver(int(number)) for number in numbers]
    return jax.lax.switch(branch, branches, vector, start, offset)


def _unpacked(kind: _Kind, gathered: jax.Array, sizes: Sequence[int]) -> list[Any]:
    """Return the solutions of each request of a kind, given how many matrices each has."""
    found = [
        gathered[device, offset : offset + count * kind.width].reshape(count, kind.width)
        for device, (offset, count) in enumerate(zip(kind.offsets, kind.share.counts, strict=True))
        if count
    ]
    whole, leaves = jnp.concatenate(found), jax.tree.leaves(kind.found)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])[:-1]
    columns = [
        part.reshape(-1, *leaf.shape[1:]).astype(leaf.dtype)
        for part, leaf in zip(jnp.split(whole, ends, axis=1), leaves, strict=True)
    ]
    solved, structure = [], jax.tree.structure(kind.found)
    stops = np.cumsum(sizes)
    for start, stop in zip(stops - sizes, stops, strict=True):
        solved.append(structure.unflatten([column[start:stop] for column in columns]))
    return solved
