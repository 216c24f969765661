"""Preconditioning by powers of dense matrices: the whole Fisher matrix or its blocks."""

from optalr.transforms.dense.block_diagonal import scale_by_block_diagonal
from optalr.transforms.dense.full_matrix import scale_by_full_matrix

__all__ = ["scale_by_block_diagonal", "scale_by_full_matrix"]
