"""Symmetric matrices of which a part is stored: all of it, its diagonal blocks or its diagonal.

A Kronecker factor of up to some thousand rows is kept and decomposed whole. Beyond that its blocks
or its diagonal stand for it. No other module needs to know which form a side has:

    A = Full(5).zeros()                                what is kept of a 5 × 5 matrix
    A = A.fold(A.of_gram(gram), decay)                 A ← decay·A + (1 − decay)·gram
    A.root(2, damping) @ G @ B.root(2, damping)        (A + λ)^{-1/2} G (B + λ)^{-1/2}

A form without an array is a description: it knows shapes and makes arrays. ``A.holding(array)`` is
a view of an array that is kept elsewhere, such as in an optimizer's state. Arrays may have leading
stack axes, those of independent layers. ``Blocks`` has a file of its own, ``blocks``.
"""

import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arrays import damped_power, diagonal, moving_average
from optalr.linalg import spd
from optalr.linalg.roots.inverse_root import inverse_root


@dataclasses.dataclass(frozen=True, eq=False)
class Structured:
    """What the three forms share.

    Attributes:
      size: n, the rows of the matrix.
      stored: what is kept of it, ``(*stack, *shape)``, or None in a description.
    """

    size: int
    stored: Any = None

    # Trailing axes of the stored array.
    rank: ClassVar[int] = 2

    @property
    def padded_size(self) -> int:
        """Rows of what is applied: more than ``size`` where the last block is padded."""
        return self.size

    @property
    def count(self) -> int:
        """Numbers that are stored per layer of the stack."""
        return math.prod(self.shape)

    @property
    def block(self) -> int:
        """Rows of each matrix that a decomposition sees; 0 where there is none to decompose."""
        return 0

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes of the stored array."""
        return self.stored.shape[: self.stored.ndim - self.rank]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored array."""
        return self.stored.size * self.stored.dtype.itemsize

    @property
    def label(self) -> str:
        """The form's name and size, for messages."""
        return f"{type(self).__name__}({self.size})"

    def is_like(self, other: "Structured") -> bool:
        """Return whether two forms keep the same part of a matrix of the same size."""
        mine, others = (self.size, self.shape), (other.size, other.shape)
        return type(self) is type(other) and mine == others

    def holding(self, stored: Any) -> Self:
        """Return a view of ``stored`` in this form."""
        return dataclasses.replace(self, stored=stored)

    def zeros(self, stack: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Self:
        """Return the zero matrix."""
        return self.holding(jnp.zeros((*stack, *self.shape), dtype))

    def fold(self, new: Self, decay: Any) -> Self:
        """Return ``decay · self + (1 − decay) · new``, the moving average after one more batch."""
        return self.holding(moving_average(self.stored, new.stored, decay))

    def scaled(self, factor: jax.Array) -> Self:
        """Return ``factor · self``, with one number for all matrices or one per layer."""
        factor = jnp.asarray(factor, self.stored.dtype)
        return self.holding(self.stored * spd.align(factor, self.stored))

    def mean(self) -> jax.Array:
        """Return the mean eigenvalue ``tr(A)/n`` of each layer, ``(*stack,)``."""
        return self.trace() / self.padded_size

    def trace(self) -> jax.Array:
        """Return the sum of the eigenvalues of each layer, ``(*stack,)``.

        Where many means are wanted, their traces are divided all at once.
        """
        entries = self.diagonal()
        return jnp.sum(entries, tuple(range(len(self.stack), entries.ndim)))

    def pad(self, matrix: jax.Array, axis: int) -> jax.Array:
        """Pad an axis of ``matrix`` with zeros to whole blocks."""
        missing = self.padded_size - self.size
        if not missing:
            return matrix
        widths = [(0, 0)] * matrix.ndim
        widths[axis] = (0, missing)
        return jnp.pad(matrix, widths)

    def __rmatmul__(self, matrix: jax.Array) -> jax.Array:
        """Return ``matrix @ self``, ``(*stack, m, padded size)``."""
        return spd.transpose(self.T @ spd.transpose(matrix))

    # What each form defines for itself.

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored array, without stack axes."""
        raise NotImplementedError

    def identity(self, stack: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Self:
        """Return the matrix that changes nothing."""
        raise NotImplementedError

    def gram(self, matrix: jax.Array) -> Self:
        """Return what is kept of ``M Mᵀ`` for ``(*stack, n, columns)``."""
        raise NotImplementedError

    def of_gram(self, gram: jax.Array) -> Self:
        """Return what is kept of a whole symmetric matrix ``(*stack, n, n)``."""
        raise NotImplementedError

    def eigenvalues(self) -> np.ndarray:
        """Return the eigenvalues, rising, in NumPy's float64: for reading, outside ``jit``."""
        raise NotImplementedError

    def diagonal(self) -> jax.Array:
        """Return the diagonal, ``(*stack, n)`` or ``(*stack, blocks, rows of a block)``."""
        raise NotImplementedError

    @property
    def T(self) -> Self:  # noqa: N802  (as in NumPy)
        """The transpose, for stored eigenvectors, which are no symmetric matrix."""
        return self.holding(spd.transpose(self.stored))

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        """Return ``self @ matrix`` for ``(*stack, padded size, n)``."""
        raise NotImplementedError


class Matrices(Structured):
    """Forms that hold matrices to decompose: a whole one, or blocks."""

    def identity(self, stack: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Self:  # noqa: D102
        eye = jnp.eye(self.block, dtype=dtype)
        # The sum makes an array of its own, because a broadcast one shares its buffer.
        return self.holding(jnp.broadcast_to(eye, (*stack, *self.shape)) + 0)

    def diagonal(self) -> jax.Array:  # noqa: D102
        return diagonal(self.stored)

    def matrices(self) -> jax.Array:
        """Return all that is to be decomposed, ``(k, block, block)``."""
        return self.stored.reshape(-1, self.block, self.block)

    def spread(self, values: jax.Array) -> jax.Array:
        """Return numbers of layers, ``(layers,)``, as those of ``matrices()``, ``(k,)``."""
        lead = self.stored.shape[:-2]
        number = math.prod(lead) // values.size
        if number == 1:
            return values
        return jnp.broadcast_to(values[:, None], (values.size, number)).reshape(-1)

    def times(self, other: Self) -> Self:
        """Return the product of two matrices of one form."""
        return self.holding(spd.matmul(self.stored, other.stored))

    def squared_entries(self) -> Self:
        """Return the matrix of squared entries."""
        return self.holding(jnp.square(self.stored))

    def root(self, p: Any = 2, damping: Any = 0.0, **how: Any) -> Self:
        """Return ``(A + damping·I)^{-1/p}``; ``how`` goes to ``inverse_root``."""
        damping = jnp.broadcast_to(jnp.asarray(damping, self.stored.dtype), self.stack)
        result = inverse_root(self.matrices(), p, damping=self.spread(damping.reshape(-1)), **how)
        return self.holding(result.root.reshape(self.stored.shape))


class Full(Matrices):
    """All of the matrix."""

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.size, self.size)

    @property
    def block(self) -> int:  # noqa: D102
        return self.size

    def gram(self, matrix: jax.Array) -> Self:  # noqa: D102
        return self.holding(spd.quick_matmul(matrix, spd.transpose(matrix)))

    def of_gram(self, gram: jax.Array) -> Self:  # noqa: D102
        return self.holding(gram)

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        return spd.quick_matmul(self.stored, matrix)

    def __rmatmul__(self, matrix: jax.Array) -> jax.Array:
        return spd.quick_matmul(matrix, self.stored)

    def eigenvalues(self) -> np.ndarray:  # noqa: D102
        return np.linalg.eigvalsh(np.asarray(self.stored, np.float64))


class Diagonal(Structured):
    """The diagonal alone."""

    rank: ClassVar[int] = 1

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.size,)

    @property
    def T(self) -> Self:  # noqa: D102, N802
        return self

    def identity(self, stack: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Self:  # noqa: D102
        return self.holding(jnp.ones((*stack, *self.shape), dtype))

    def gram(self, matrix: jax.Array) -> Self:  # noqa: D102
        return self.holding(jnp.sum(jnp.square(matrix), -1))

    def of_gram(self, gram: jax.Array) -> Self:  # noqa: D102
        return self.holding(diagonal(gram))

    def diagonal(self) -> jax.Array:  # noqa: D102
        return self.stored

    def root(self, p: Any = 2, damping: Any = 0.0) -> Self:
        """Return ``(A + damping·I)^{-1/p}``, and 1 where the damped entry is not positive."""
        damping = jnp.asarray(damping, self.stored.dtype)
        return self.power(-1 / p, jnp.broadcast_to(damping, self.stack))

    def power(self, power: Any, damping: jax.Array) -> Self:
        """Return ``(A + damping·I)^power``, and 1 where the damped entry is not positive."""
        return self.holding(damped_power(self.stored, spd.align(damping, self.stored), power))

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        return self.stored[..., :, None] * matrix

    def eigenvalues(self) -> np.ndarray:  # noqa: D102
        return np.sort(np.asarray(self.stored, np.float64), -1)


for _form in (Full, Diagonal):
    jax.tree_util.register_dataclass(_form, data_fields=["stored"], meta_fields=["size"])


def as_structured(matrix: Any) -> Structured:
    """Return an array as all of a matrix, and any of the three forms as it is."""
    return matrix if isinstance(matrix, Structured) else Full(matrix.shape[-1], matrix)
