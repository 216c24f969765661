"""How a method stores the Kronecker factors of a leaf: decided from shapes and options alone.

The coverage report and the transformation both read it, so that what is printed is what is kept.
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Side:
    """How the factor of one side of a leaf's matrix view is stored.

    Attributes:
      size: rows (or columns) of the matrix view, one more where it holds a joint bias.
      form: ``"full"``; ``"blocks"``, a block-diagonal factor; ``"diagonal"``, its diagonal.
      num_blocks: blocks of a ``"blocks"`` side.
    """

    size: int
    form: str = "full"
    num_blocks: int = 1

    @property
    def block(self) -> int:
        """Rows of a block; the last block may be padded."""
        return math.ceil(self.size / self.num_blocks)

    @property
    def padded_size(self) -> int:
        """Rows of all blocks together."""
        return self.num_blocks * self.block

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored factor, without stack axes."""
        if self.form == "diagonal":
            return (self.size,)
        if self.form == "blocks":
            return (self.num_blocks, self.block, self.block)
        return (self.size, self.size)


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

    def side(self, size: int) -> Side:
        """Say how a side of this size is stored."""
        if self.block_size is not None and size > self.block_size:
            return Side(size, "blocks", math.ceil(size / self.block_size))
        if size > self.max_factor_size:
            return Side(size, "diagonal")
        return Side(size)

    @property
    def keeps_bases(self) -> bool:
        """Tell whether bases are kept beside the roots, to be refreshed."""
        return self.spectrum == "factored" and self.root_method == "eigenbasis"

    def count_numbers(self, stack: Sequence[int], sides: tuple[Side, Side]) -> int:
        """Count what is kept for a kernel: factors, roots and what goes with them."""
        total = 0
        for side in sides:
            copies = 3 if self.keeps_bases and side.form != "diagonal" else 2
            total += copies * math.prod(side.shape)
            if self.spectrum != "factored":
                total += side.padded_size
        if self.spectrum == "measured":
            total += sides[0].padded_size * sides[1].padded_size
        return math.prod(stack) * total

    def notes(self, sides: tuple[Side, Side]) -> list[str]:
        """Say which sides are not stored whole, and why."""
        said = []
        for name, side in zip(("rows", "cols"), sides, strict=True):
            if side.form == "diagonal":
                limit = f"{side.size} > max_factor_size={self.max_factor_size}"
                said.append(f"{name} keep a diagonal ({limit})")
            elif side.form == "blocks":
                limit = f"{side.size} > block_size={self.block_size}"
                said.append(f"{name} in {side.num_blocks} blocks of {side.block} ({limit})")
        return said
