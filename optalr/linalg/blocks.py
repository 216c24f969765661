"""Symmetric matrices of which the diagonal blocks are stored: the third form of ``structured``."""

import dataclasses
import math
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arrays import diagonal
from optalr.linalg import spd
from optalr.linalg.structured import Matrices


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(Matrices):
    """Diagonal blocks of equal size; the last one is padded where they don't divide the rows.

    Padded rows of a Gram matrix get the mean eigenvalue: they stay apart from the others and change
    neither the mean nor the condition. The matrices that blocks are applied to are padded too, so
    that coordinates in the eigenbasis of a padded block lose nothing.

    Attributes:
      num_blocks: how many.
    """

    num_blocks: int = 1
    rank: ClassVar[int] = 3

    @property
    def block(self) -> int:  # noqa: D102
        return math.ceil(self.size / self.num_blocks)

    @property
    def padded_size(self) -> int:  # noqa: D102
        return self.num_blocks * self.block

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.num_blocks, self.block, self.block)

    def gram(self, matrix: jax.Array) -> Self:
        """Return what is kept of ``M Mᵀ``, by one product a block."""
        parts = self._rows_of_blocks(self.pad(matrix, -2))
        return self._fill_padding(spd.quick_matmul(parts, spd.transpose(parts)))

    def of_gram(self, gram: jax.Array) -> Self:  # noqa: D102
        padded = self.pad(self.pad(gram, -1), -2)
        blocks = padded.reshape(*gram.shape[:-2], *(self.num_blocks, self.block) * 2)
        return self._fill_padding(jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3))

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        return spd.quick_matmul(self.stored, self._rows_of_blocks(matrix)).reshape(matrix.shape)

    def eigenvalues(self) -> np.ndarray:
        """Return the eigenvalues of all blocks, rising, but not those of the padding."""
        stored, parts = np.asarray(self.stored, np.float64), []
        for i in range(self.num_blocks):
            filled = min(self.block, self.size - i * self.block)
            parts.append(np.linalg.eigvalsh(stored[..., i, :filled, :filled]))
        return np.sort(np.concatenate(parts, -1), -1)

    def _rows_of_blocks(self, matrix: jax.Array) -> jax.Array:
        """Return padded rows block by block, ``(*stack, blocks, rows of a block, columns)``."""
        lead, columns = matrix.shape[:-2], matrix.shape[-1]
        return matrix.reshape(*lead, self.num_blocks, self.block, columns)

    def _fill_padding(self, blocks: jax.Array) -> Self:
        """Hold the blocks of a Gram matrix, with its mean eigenvalue in the rows of zeros."""
        if self.padded_size == self.size:
            return self.holding(blocks)
        mean = jnp.sum(diagonal(blocks), (-2, -1)) / self.size
        is_padding = (jnp.arange(self.padded_size) >= self.size).astype(blocks.dtype)
        corner = jax.vmap(jnp.diag)(is_padding.reshape(self.num_blocks, self.block))
        return self.holding(
            blocks + spd.align(mean, blocks) * jnp.broadcast_to(corner, blocks.shape)
        )


jax.tree_util.register_dataclass(Blocks, data_fields=["stored"], meta_fields=["size", "num_blocks"])
