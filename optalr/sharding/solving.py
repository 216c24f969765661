"""Work on many matrices, each done by one device of a mesh: their roots, or products by them.

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
   device with the most. All devices' vectors are gathered at once, and cut up by the plan. Where
   there are fewer matrices than devices, many vectors are empty. Then those that are not are first
   dealt out over all devices by an all-to-all, so that no empty one is gathered.

Matrices that rest by rows (``Spread.rests``) go to their owners by one all-to-all, and their roots
go back to rows by another. A device then never holds more than its share of either. Gradients and
roots go to the owners of products in the same way, and updates come back (``work_over``).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from optalr.linalg import by_size
from optalr.sharding.planning import Kind, Piece, Plan, Work, plan_for, root_work
from optalr.sharding.spread import Spread


def solve_over(
    spread: Spread | None, solve: by_size.Solve, requests: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Call ``solve`` for requests of every size, on the device that owns each matrix.

    Args:
      spread: the mesh; None for every matrix on every device.
      solve: as ``by_size.Solve`` says. On a mesh it is called for one size at a time.
      requests: tuples of arrays with one first axis, the first of them ``(k, n, n)``; a part that
        is None must be None in all requests of its kind.

    Returns:
      One pytree a request, in the given order: on every device, or by rows where matrices rest so.
      Inside a ``shard_map`` every device solves all of them.

    Raises:
      ValueError: ``jax.set_mesh`` was given another mesh.

    Cost: the flops of a device are at most the mean and one matrix. There is one all-gather of all
    solutions, or two all-to-alls of a device's share where matrices rest by rows.
    """
    mesh = None if spread is None or spread.num_devices == 1 else spread.at_hand()
    if spread is None or mesh is None or not requests:
        return by_size.solve_by_size(solve, requests)
    return work_over(spread, mesh, root_work(spread, solve, requests))


def work_over(spread: Spread, mesh: Mesh | AbstractMesh, works: Sequence[Work]) -> list[Any]:
    """Do work of several kinds, on the device that owns each matrix.

    Args:
      spread: who shares the work.
      mesh: as the code at hand sees it, ``spread.at_hand()``.
      works: whose places are those of all requests together, each once.

    Returns:
      One pytree a request, in the order of the places.

    Cost: an all-to-all for all parts that are cut, one for all solutions that are, and an
    all-gather for all others.
    """
    plan = plan_for(spread, works)

    # What a device has differs from the others', and the loops of a solver need not say so.
    gathered, cut = jax.shard_map(
        lambda parts: _of_device(spread, plan, parts=parts),
        mesh=mesh,
        in_specs=([_specs(spread, kind.given) for kind in plan.kinds],),
        out_specs=(PartitionSpec(), [_specs(spread, _cut(kind)) for kind in plan.kinds]),
        check_vma=False,
    )([kind.work.parts for kind in plan.kinds])
    solved: dict[int, Any] = {}
    for kind, own in zip(plan.kinds, cut, strict=True):
        remaining = iter(own)
        leaves = [
            _collected(kind, piece, gathered, rows=plan.rows)
            if piece.cut is None
            else next(remaining)
            for piece in kind.found
        ]
        solved.update(_by_request(kind, leaves))
    return [solved[i] for i in sorted(solved)]


def _specs(spread: Spread, pieces: Sequence[Piece | None]) -> list[PartitionSpec]:
    """Return how the stacks lie that pieces belong to."""
    return [
        PartitionSpec()
        if piece is None or piece.cut is None
        else PartitionSpec(*(None,) * (1 + piece.cut), spread.names)
        for piece in pieces
    ]


def _cut(kind: Kind) -> list[Piece]:
    """Return the pieces of a solution of which each device keeps some."""
    return [piece for piece in kind.found if piece.cut is not None]


class _Boxes(NamedTuple):
    """What a device writes its solutions into."""

    vector: jax.Array  # (length,), for all devices
    rows: jax.Array  # (num_devices, length), the rows for each device


def _of_device(spread: Spread, plan: Plan, *, parts: Any) -> Any:
    """Return what all devices have found, and this device's rows of it."""
    kinds = [
        kind._replace(work=kind.work._replace(parts=own))
        for kind, own in zip(plan.kinds, parts, strict=True)
    ]
    plan, dtype = plan._replace(kinds=kinds), plan.dtype
    place = jax.lax.axis_index(spread.names)
    arrived = None
    if plan.arriving.length:
        arrived = jax.lax.all_to_all(_letters(plan, dtype), spread.names, 0, 0, tiled=True)
    rows = jnp.zeros((spread.num_devices, plan.leaving.length), dtype)
    boxes = _Boxes(jnp.zeros(plan.gathered.length, dtype), rows)
    for kind in plan.kinds:
        boxes = _solve_share(kind, boxes, place=place, arrived=arrived)
    gathered = _gathered(boxes.vector, plan, spread.names)
    if not plan.leaving.length:
        return gathered, [[] for _ in plan.kinds]
    returned = jax.lax.all_to_all(boxes.rows, spread.names, 0, 0, tiled=True)
    each = range(plan.num_devices)
    own = [
        [_collected(kind, piece, returned, rows=each) for piece in _cut(kind)]
        for kind in plan.kinds
    ]
    return gathered, own


def _gathered(vector: jax.Array, plan: Plan, names: tuple[str, ...]) -> jax.Array:
    """Return the vectors of all devices, or of those that have any matrices (``plan.rows``)."""
    busy, num_devices = plan.busy, plan.num_devices
    if not vector.size:
        return vector
    if not plan.deals_out:
        return jax.lax.all_gather(vector, names)
    dealt = jnp.pad(vector, (0, -vector.size % num_devices)).reshape(num_devices, -1)
    dealt = jax.lax.all_to_all(dealt, names, 0, 0, tiled=True)[busy]
    return jax.lax.all_gather(dealt, names, axis=1).reshape(len(busy), -1)


def _letters(plan: Plan, dtype: Any) -> jax.Array:
    """Return this device's rows of all matrices, ``(num_devices, length)``, by their owners."""
    letters = []
    for owner in range(plan.num_devices):
        content = [
            part[kind.share.starts[owner] :][: kind.share.counts[owner]].astype(dtype).reshape(-1)
            for kind in plan.kinds
            for part, piece in zip(kind.work.parts, kind.given, strict=True)
            if piece is not None
        ]
        letter = jnp.concatenate(content)
        letters.append(jnp.pad(letter, (0, plan.arriving.length - letter.size)))
    return jnp.stack(letters)


def _solve_share(
    kind: Kind, boxes: _Boxes, *, place: jax.Array, arrived: jax.Array | None
) -> _Boxes:
    """Write the solutions of a device's matrices of one kind into its boxes."""

    def here(table: np.ndarray) -> jax.Array:
        return jnp.asarray(table, jnp.int32)[place]

    def own(part: Any, piece: Piece | None, number: int) -> Any:
        if part is None:
            return None
        if piece is None or arrived is None:
            return jax.lax.dynamic_slice_in_dim(part, here(kind.share.starts), number)
        size = number * piece.size
        rows = jax.lax.dynamic_slice_in_dim(arrived, here(piece.begin), size, axis=1)
        return _whole(rows.reshape(-1, number, *piece.shape), piece.cut).astype(piece.dtype)

    def solver(number: int) -> Callable[[_Boxes], _Boxes]:
        def write(boxes: _Boxes) -> _Boxes:
            if not number:
                return boxes
            parts = zip(kind.work.parts, kind.given, strict=True)
            solution = kind.work.solve(*(own(part, piece, number) for part, piece in parts))
            leaves = jax.tree.leaves(solution)
            for leaf, piece in zip(leaves, kind.found, strict=True):
                boxes = _written(boxes, leaf, piece, begin=here(piece.begin))
            return boxes

        return write

    numbers, which = np.unique(kind.share.counts, return_inverse=True)
    return jax.lax.switch(here(which), [solver(int(number)) for number in numbers], boxes)


def _written(boxes: _Boxes, leaf: jax.Array, piece: Piece, *, begin: jax.Array) -> _Boxes:
    """Return the boxes with a leaf of a device's solutions."""
    leaf = leaf.astype(boxes.vector.dtype)
    if piece.cut is None:
        vector = jax.lax.dynamic_update_slice_in_dim(boxes.vector, leaf.reshape(-1), begin, 0)
        return boxes._replace(vector=vector)
    num_devices = boxes.rows.shape[0]
    axis = 1 + piece.cut
    shape = [leaf.shape[0], *piece.shape]
    shape.insert(axis, num_devices)
    rows = jnp.moveaxis(leaf.reshape(shape), axis, 0).reshape(num_devices, -1)
    return boxes._replace(rows=jax.lax.dynamic_update_slice_in_dim(boxes.rows, rows, begin, 1))


def _whole(rows: jax.Array, cut: int | None) -> jax.Array:
    """Return ``(k, *shape)`` from what each device had of it, ``(num_devices, k, ...)``."""
    axis = 1 if cut is None else 1 + cut
    together = jnp.moveaxis(rows, 0, axis)
    shape = together.shape
    return together.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _collected(kind: Kind, piece: Piece, vectors: jax.Array, *, rows: Sequence[int]) -> jax.Array:
    """Return a piece of all matrices' solutions, given devices' vectors and the row of each."""
    found = [
        vectors[row, begin : begin + count * piece.size].reshape(count, *piece.shape)
        for row, begin, count in zip(rows, piece.begin, kind.share.counts, strict=True)
        if count
    ]
    return jnp.concatenate(found).astype(piece.dtype)


def _by_request(kind: Kind, leaves: Sequence[jax.Array]) -> dict[int, Any]:
    """Return the solution of each request of a kind, by its place among all."""
    solved, start = {}, 0
    for i, number in zip(kind.work.places, kind.work.numbers, strict=True):
        stop = start + number
        solved[i] = kind.structure.unflatten([leaf[start:stop] for leaf in leaves])
        start = stop
    return solved
