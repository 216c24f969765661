"""Where everything lies while work is shared out: known before any number is."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optalr.linalg import by_size
from optalr.sharding.owners import Share, share_out_jobs
from optalr.sharding.spread import Spread


class Ledger:
    """Where matrices lie in a vector that each device has, one kind behind the other.

    All vectors have the length of the longest. So a kind that one device has and another lacks
    takes no room of its own.
    """

    def __init__(self, num_devices: int):
        self._used = np.zeros(num_devices, np.int64)

    def enter(self, counts: np.ndarray, numbers: int) -> np.ndarray:
        """Return where each device's matrices of a kind begin, given the numbers of each.

        Raises:
          ValueError: a vector would be longer than jax's int32 can index.
        """
        begin = self._used
        self._used = begin + counts * numbers
        if self.length > np.iinfo(np.int32).max:
            raise ValueError(
                f"mesh has too few devices, {len(counts)}: the matrices of one of them have "
                f"{self.length} numbers, more than an index can count. Use more devices."
            )
        return begin

    @property
    def length(self) -> int:
        """How long the vectors are."""
        return int(self._used.max())


class Work(NamedTuple):
    """What there is to do for all matrices of one kind, and how they lie.

    Attributes:
      solve: takes the parts, and returns a pytree of arrays with their first axis. What it returns
        for a matrix depends on no other matrix.
      places: of the requests, among all.
      numbers: how many matrices each request has.
      parts: of the requests, each joined along its first axis, or None.
      cost: of one matrix, in a unit that all kinds share.
      cuts: for each part, the axis of one matrix along which each device holds some of it; None for
        a part that every device holds.
      cut_of: given the shape of one matrix's solution, returns the same of a leaf of it.
    """

    solve: Callable[..., Any]
    places: list[int]
    numbers: list[int]
    parts: list[Any]
    cost: int
    cuts: list[int | None]
    cut_of: Callable[[tuple[int, ...]], int | None]


class Piece(NamedTuple):
    """A part of a request or of a solution, and where the numbers of each device's share begin."""

    shape: tuple[int, ...]  # of one matrix's, or of what a device holds of it
    dtype: Any
    begin: np.ndarray  # (num_devices,)
    cut: int | None  # the axis along which each device holds some

    @property
    def size(self) -> int:
        """How many numbers there are for a matrix."""
        return math.prod(self.shape)


class Kind(NamedTuple):
    """The work for all matrices of one kind, shared out.

    Attributes:
      work: what there is to do.
      share: which of the matrices each device takes.
      given: a piece for each part, None for one that is whole on every device.
      found: a piece for each leaf of the solution.
      structure: of the solution.
    """

    work: Work
    share: Share
    given: list[Piece | None]
    found: list[Piece]
    structure: Any


class Plan(NamedTuple):
    """How all requests are shared out.

    Attributes:
      kinds: of matrices.
      gathered: the vector in which a device has what all others get.
      arriving: the vector of rows that a device gets from each other one.
      leaving: the vector of rows that a device sends to each other one.
    """

    kinds: list[Kind]
    gathered: Ledger
    arriving: Ledger
    leaving: Ledger

    @property
    def num_devices(self) -> int:
        """How many shares there are."""
        return len(self.kinds[0].share.counts)

    @property
    def busy(self) -> np.ndarray:
        """The devices that have any matrices."""
        return np.flatnonzero(sum(kind.share.counts for kind in self.kinds))

    @property
    def deals_out(self) -> bool:
        """Whether vectors are dealt out before they are gathered: it costs what one vector does."""
        return len(self.busy) + 1 < self.num_devices

    @property
    def rows(self) -> list[int]:
        """The row of each device among the vectors that are gathered; any for one without."""
        if not self.deals_out:
            return list(range(self.num_devices))
        return np.searchsorted(self.busy, np.arange(self.num_devices)).tolist()

    @property
    def dtype(self) -> Any:
        """What holds the numbers of all pieces."""
        return np.result_type(*(piece.dtype for kind in self.kinds for piece in kind.found))


def root_work(
    spread: Spread, solve: by_size.Solve, requests: Sequence[tuple[Any, ...]]
) -> list[Work]:
    """Return the work of taking roots, a kind for each size and dtype of the matrices."""

    def solve_one(*parts: Any) -> Any:
        return solve([parts])[0]

    kinds = []
    for places in by_size.places_by_size(requests):
        parts = by_size.joined([requests[i] for i in places])
        n = parts[0].shape[-1]
        rests = spread.rests and n % spread.num_devices == 0

        def cut_of(shape: tuple[int, ...], rests=rests) -> int | None:
            return 0 if rests and len(shape) == 2 else None

        cuts = [None if part is None else cut_of(part.shape[1:]) for part in parts]
        numbers = [requests[i][0].shape[0] for i in places]
        kinds.append(Work(solve_one, places, numbers, parts, n**3, cuts, cut_of))
    return kinds


def plan_for(spread: Spread, works: Sequence[Work]) -> Plan:
    """Return who takes which matrices, and where everything lies meanwhile."""
    num_devices, kinds = spread.num_devices, []
    gathered, arriving, leaving = (Ledger(num_devices) for _ in range(3))
    numbers = [work.parts[0].shape[0] for work in works]
    shares = share_out_jobs([work.cost for work in works], numbers, num_devices)
    for work, share in zip(works, shares, strict=True):

        def piece(leaf: Any, cut: int | None, to: Ledger, share=share) -> Piece:
            shape = list(leaf.shape[1:])
            if cut is not None:
                shape[cut] //= num_devices
            return Piece(tuple(shape), leaf.dtype, to.enter(share.counts, math.prod(shape)), cut)

        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), work.parts)
        leaves, structure = jax.tree.flatten(jax.eval_shape(work.solve, *one))
        given = [
            None if cut is None else piece(part, cut, arriving)
            for part, cut in zip(work.parts, work.cuts, strict=True)
        ]
        cuts = [work.cut_of(leaf.shape[1:]) for leaf in leaves]
        found = [
            piece(leaf, cut, gathered if cut is None else leaving)
            for leaf, cut in zip(leaves, cuts, strict=True)
        ]
        kinds.append(Kind(work, share, given, found, structure))
    return Plan(kinds, gathered, arriving, leaving)
