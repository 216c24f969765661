"""Where everything lies while roots are shared out: known before any number is."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optalr.linalg import by_size
from optalr.sharding.owners import Share, share_out
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
                f"mesh has too few devices, {len(counts)}: the roots of one of them have "
                f"{self.length} numbers, more than an index can count. Use more devices."
            )
        return begin

    @property
    def length(self) -> int:
        """How long the vectors are."""
        return int(self._used.max())


class Piece(NamedTuple):
    """A part of a request or of a solution, and where the numbers of each device's share begin."""

    shape: tuple[int, ...]  # of one matrix's
    dtype: Any
    begin: np.ndarray  # (num_devices,)
    cut: bool  # whether each device holds some of its rows

    @property
    def size(self) -> int:
        """How many numbers there are for a matrix."""
        return math.prod(self.shape)


class Kind(NamedTuple):
    """All matrices of one size and dtype.

    Attributes:
      places: of their requests, among all.
      parts: the parts of the requests, each joined along its first axis, or None.
      share: which of the matrices each device solves.
      given: a piece for each part, None for one that is whole on every device.
      found: a piece for each leaf of the solution.
      structure: of the solution.
    """

    places: list[int]
    parts: list[Any]
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


def plan_for(spread: Spread, solve: by_size.Solve, requests: Sequence[tuple[Any, ...]]) -> Plan:
    """Return who solves which request, and where everything lies meanwhile."""
    num_devices, kinds = spread.num_devices, []
    gathered, arriving, leaving = (Ledger(num_devices) for _ in range(3))
    places = by_size.places_by_size(requests)
    stacks = [by_size.joined([requests[i] for i in of_kind]) for of_kind in places]
    shapes = [parts[0].shape for parts in stacks]
    shares = share_out([s[-1] for s in shapes], [s[0] for s in shapes], num_devices)
    for of_kind, parts, share in zip(places, stacks, shares, strict=True):
        rests = spread.rests and parts[0].shape[-1] % num_devices == 0

        def piece(leaf: Any, to: Ledger, rests=rests, share=share) -> Piece:
            cut = rests and leaf.ndim == 3
            shape = (leaf.shape[1] // num_devices, leaf.shape[2]) if cut else leaf.shape[1:]
            begin = to.enter(share.counts, math.prod(shape))
            return Piece(shape, leaf.dtype, begin, cut)

        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), parts)
        leaves, structure = jax.tree.flatten(jax.eval_shape(solve, [one])[0])
        is_cut = [rests and part is not None and part.ndim == 3 for part in parts]
        given = [piece(p, arriving) if cut else None for p, cut in zip(parts, is_cut, strict=True)]
        found = [piece(x, leaving if rests and x.ndim == 3 else gathered) for x in leaves]
        kinds.append(Kind(of_kind, parts, share, given, found, structure))
    return Plan(kinds, gathered, arriving, leaving)
