"""Preconditioning by powers of dense matrices: the whole second moment, or its blocks.

Two methods share the room, ``block_diagonal`` and ``full_matrix`` (with its ``window`` of the last
gradients), and with them ``second_moment``: how moments are accumulated and when roots are taken.
"""

from optalr.transforms.dense.block_diagonal import BlockDiagonalState, scale_by_block_diagonal
from optalr.transforms.dense.full_matrix import FullMatrixState, scale_by_full_matrix
from optalr.transforms.dense.window import WindowedState

__all__ = [
    "BlockDiagonalState",
    "FullMatrixState",
    "WindowedState",
    "scale_by_block_diagonal",
    "scale_by_full_matrix",
]
