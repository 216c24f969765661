"""How a method stores the Kronecker factors of a leaf, decided from shapes and options alone.

The coverage report and the transformation both read it: what is printed is what is kept.
"""

import dataclasses
import math
from collections.abc import Sequence

from optalr.linalg.structured import Blocks, Diagonal, Full

# What a side stores.
Form = Full | Blocks | Diagonal


@dataclasses.dataclass(frozen=True)
class FactorStorage:
    """The options of a Kronecker-factored method that decide what it keeps of a leaf.

    Attributes:
      spectrum: ``"factored"`` keeps roots; ``"exact"`` eigenbases and eigenvalues; ``"measured"``
        a second moment of the leaf's size beside these.
      block_size: sides longer than this get block-diagonal factors of at most this size.
      max_factor_size: sides longer than this, and not blocked, keep only their factor's diagonal.
      joint_bias: treat a bias as one more row of its kernel.
      root_method: with ``"eigenbasis"`` a factored spectrum keeps the bases beside the roots.
    """

    spectrum: str = "factored"
    block_size: int | None = None
    max_factor_size: int = 4096
    joint_bias: bool = False
    root_method: str = "auto"

    def side(self, size: int) -> Form:
        """Return how the factor of a side of this size is stored."""
        if self.block_size is not None and size > self.block_size:
            return Blocks(size, num_blocks=math.ceil(size / self.block_size))
        if size > self.max_factor_size:
            return Diagonal(size)
        return Full(size)

    def count_numbers(self, stack: Sequence[int], sides: Sequence[Form]) -> int:
        """Return how many numbers are kept for a kernel: factors, roots and what goes with them."""
        keeps_roots = self.spectrum == "factored"
        keeps_bases = keeps_roots and self.root_method == "eigenbasis"
        total = 0
        for side in sides:
            total += 2 * side.count
            if keeps_bases and not isinstance(side, Diagonal):
                total += side.count
            if not keeps_roots:
                total += side.padded_size
        if self.spectrum == "measured":
            total += math.prod(side.padded_size for side in sides)
        return math.prod(stack) * total

    def notes(self, sides: Sequence[Form]) -> list[str]:
        """Return which sides are not stored whole, and why."""
        notes = []
        for name, side in zip(("rows", "cols"), sides, strict=True):
            if isinstance(side, Diagonal):
                limit = f"{side.size} > max_factor_size={self.max_factor_size}"
                notes.append(f"{name} keep a diagonal ({limit})")
            elif isinstance(side, Blocks):
                limit = f"{side.size} > block_size={self.block_size}"
                notes.append(f"{name} in {side.num_blocks} blocks of {side.block} ({limit})")
        return notes
