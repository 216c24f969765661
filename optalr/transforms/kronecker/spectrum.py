"""The spectrum that the power acts on, one class for each value of ``options.spectrum``.

``Factored`` takes the power of each factor alone and keeps their roots. The others keep eigenbases
Q_A and Q_B, and take the power of numbers of the gradient's own shape, (m, n): ``Exact`` of the
products of eigenvalues, ``Measured`` of squared gradients in the eigenbases.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import is_concrete
from optalr.arrays import damped_power
from optalr.linalg import carry_second_moments, spd, to_eigenbasis
from optalr.linalg.roots.bases import eigenbasis, near_eigenbasis, rounding_of
from optalr.linalg.roots.methods import checked_power
from optalr.linalg.roots.stacks import Asked, Manner, solve
from optalr.linalg.structured import Diagonal, Matrices, Structured
from optalr.sharding.spread import Spread
from optalr.signals.moments import OuterProducts
from optalr.transforms.kronecker.leaves import Kernel, Leaf
from optalr.transforms.kronecker.memory import NOTHING, LeafMemory, SideMemory, roots_of
from optalr.transforms.kronecker.rule import Rule

# An eigendecomposition succeeds if ‖AQ − QΛ‖_F/‖A‖_F is below this, in units of √n ε.
_EIGH_TOLERANCE = 100.0
# How far a refreshed basis may be from the eigenvectors before all are computed anew. The first
# bounds the root's ‖XAX − I‖_F/√n. With it two or three roots in a hundred are computed anew, and
# the direction stays within 0.24 of the exact one (benchmarks/warm_basis.py: an MLP on digits). The
# second bounds ‖AQ − QΛ‖_F/‖A‖_F where the basis itself is used. It is a guess.
_WARM_ROOT_TOLERANCE = 0.3
_WARM_BASIS_TOLERANCE = 0.1

# For each size (k, b, b) matrices, (k,) dampings, and bases to start from or None.
Kinds = Sequence[Sequence[Any]]


class Decomposition(NamedTuple):
    """What a refresh finds for each of k matrices of b rows."""

    found: SideMemory  # root (k, b, b), eigenvalues (k, b) and basis (k, b, b), where they are kept
    error: jax.Array  # (k,), the residual; infinite where it is too large
    # (k,) bool, where an eigendecomposition stood in for an iteration; None where none iterates
    fell_back: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """What the three spectra have in common.

    Attributes:
      rule: the power and the damping.
      root_method: of ``inverse_root``; ``"eigenbasis"`` refreshes the last basis.
    """

    rule: Rule
    root_method: str
    keeps_eigenvalues: ClassVar[bool] = True
    keeps_eigen_moment: ClassVar[bool] = False

    @property
    def kept(self) -> LeafMemory:
        """``NOTHING`` in place of each part of a memory that no leaf keeps."""
        side = SideMemory(
            factor=True,
            root=True,
            eigenvalues=True if self.keeps_eigenvalues else NOTHING,
            basis=NOTHING if self.keeps_eigenvalues or not self.refreshes_bases else True,
        )
        return LeafMemory(side, side, True, True if self.keeps_eigen_moment else NOTHING)

    @property
    def refreshes_bases(self) -> bool:
        """Whether each basis starts from the last one."""
        return self.root_method == "eigenbasis"

    def start(self, side: Structured, stack: tuple[int, ...], dtype: Any) -> SideMemory:
        """Return an empty factor, and a root that changes nothing."""
        zero, root = side.zeros(stack, dtype).stored, side.identity(stack, dtype).stored
        return SideMemory(zero, root, jnp.ones((*stack, side.padded_size), dtype), NOTHING)

    def start_second_moment(self, leaf: Kernel, dtype: Any) -> Any:
        """Return the second moments that a kernel starts with."""
        del leaf, dtype
        return NOTHING

    def squares(self, leaf: Kernel, memory: LeafMemory, matrix: jax.Array) -> Any:
        """Return what a gradient, as a padded matrix, adds to the second moments."""
        del leaf, memory, matrix
        return NOTHING

    def carry(
        self, leaf: Kernel, before: LeafMemory, after: LeafMemory, *, first: jax.Array
    ) -> Any:
        """Return the second moments in new eigenbases."""
        del leaf, before, first
        return after.eigen_moment

    def last_basis(self, side: SideMemory) -> Any:
        """Return the basis that the next decomposition starts from, or None."""
        return side.root if self.refreshes_bases else None

    def decompose(
        self, kinds: Kinds, *, scale: jax.Array, first: jax.Array, repairs: bool
    ) -> list[Decomposition]:
        """Return what is found for each size of matrices of one dtype.

        Args:
          kinds: what is to be decomposed.
          scale: () float32, by which the matrices are to be multiplied.
          first: () bool, whether there are no roots yet.
          repairs: whether an eigendecomposition stands in where an iteration misses.
        """
        del repairs  # bases are only refreshed where that is good enough

        def of_kind(matrices: jax.Array, _: Any, last: Any) -> Decomposition:
            # Any basis diagonalizes a factor of zeros, so it cannot fail.
            zero = (matrices == 0).all((-2, -1))
            matrices = matrices * scale.astype(matrices.dtype)
            if last is None:
                basis, limit = eigenbasis(matrices), _EIGH_TOLERANCE * rounding_of(matrices)
            else:
                limit = _WARM_BASIS_TOLERANCE
                basis = near_eigenbasis(matrices, last, limit=limit, anew=first, never=zero)
            error = jnp.where(basis.residual <= limit, basis.residual, jnp.inf)
            found = SideMemory(root=basis.vectors, eigenvalues=jnp.maximum(basis.values, 0))
            return Decomposition(found, jnp.where(zero, 0, error))

        return [of_kind(*kind) for kind in kinds]

    def of_diagonal(self, factor: Diagonal, damping: jax.Array, last: SideMemory) -> SideMemory:
        """Return what a diagonal factor's memory becomes, whose basis is always the identity."""
        del damping
        return last._replace(eigenvalues=factor.stored)

    def gains(self, memory: LeafMemory) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return three arrays whose product, perhaps out of range, is ``(v + λ)^p``."""
        row_unit, col_unit = self.units(memory)
        values = self.values(memory)
        added = self.rule.added(values, num_axes=2)
        if not self.rule.damping_form.is_relative:
            # An absolute damping far above all eigenvalues would overflow in their units, so it
            # becomes the unit.
            added = added / row_unit
            larger = jnp.maximum(col_unit, added)
            values, added = values * (col_unit / larger), added / larger
            col_unit = larger
        power = jnp.asarray(self.rule.power, values.dtype)
        powered = damped_power(values, added, self.rule.power)
        return powered, jnp.power(row_unit, power), jnp.power(col_unit, power)

    def gains_of_side(self, side: SideMemory) -> jax.Array:
        """Return ``(b + λ)^p`` for the eigenvalues b of one factor, ``(*stack, n)``."""
        added = self.rule.added(side.eigenvalues, num_axes=1)
        return damped_power(side.eigenvalues, added, self.rule.exponent)

    def values(self, memory: LeafMemory) -> jax.Array:
        """Return the numbers v that the power is taken of, in units of ``units``."""
        return self.outer(memory)

    def outer(self, memory: LeafMemory) -> jax.Array:
        """Return the eigenvalues of the Kronecker product in its units, ``(*stack, m, n)``."""
        rows = self._shared(memory.rows.eigenvalues)[..., :, None]
        cols = self._shared(memory.cols.eigenvalues)[..., None, :]
        row_unit, col_unit = self.units(memory)
        return (rows / row_unit) * (cols / col_unit)

    def units(self, memory: LeafMemory) -> tuple[jax.Array, jax.Array]:
        """Return the largest eigenvalues of both sides, ``(*stack, 1, 1)``.

        Eigenvalues of the Kronecker product, and second moments, are kept relative to their
        product, which itself leaves float32's range for tiny or huge factors.
        """
        return self._unit(memory.rows.eigenvalues), self._unit(memory.cols.eigenvalues)

    def _unit(self, eigenvalues: jax.Array) -> jax.Array:
        largest = jnp.max(eigenvalues, -1)[..., None, None]
        return self._shared(jnp.where(largest > 0, largest, 1))

    def _shared(self, eigenvalues: jax.Array) -> jax.Array:
        """Return eigenvalues of a factor of the Fisher matrix, not of its square."""
        return eigenvalues if self.rule.share == 1 else jnp.sqrt(eigenvalues)


class Factored(Spectrum):
    """The power of each factor alone, damped alone: ``A^p G B^p`` by ready-made roots."""

    keeps_eigenvalues: ClassVar[bool] = False

    def start(self, side: Structured, stack: tuple[int, ...], dtype: Any) -> SideMemory:  # noqa: D102
        memory = super().start(side, stack, dtype)._replace(eigenvalues=NOTHING)
        if not (self.refreshes_bases and isinstance(side, Matrices)):
            return memory
        return memory._replace(basis=side.identity(stack, dtype).stored)

    def last_basis(self, side: SideMemory) -> Any:  # noqa: D102
        return side.basis if self.refreshes_bases else None

    def decompose(  # noqa: D102
        self, kinds: Kinds, *, scale: jax.Array, first: jax.Array, repairs: bool
    ) -> list[Decomposition]:
        stacks, dampings, last = (list(parts) for parts in zip(*kinds, strict=True))
        if is_concrete(self.rule.exponent) and float(self.rule.exponent) == 0:
            return [_identities(*kind) for kind in kinds]  # no root has the order -1/0
        damping, p = spd.join(dampings), -1 / self.rule.exponent
        power = checked_power(p, self.root_method, 3)
        # A basis that has moved too far is nothing rare: it is always decomposed at once.
        manner = Manner(power, self.root_method, repairs=repairs or self.refreshes_bases)
        every, take = partial(jnp.full_like, damping), partial(solve, manner=manner)
        asked = Asked(stacks, damping, every(scale), every(p) if power is None else None)
        warm = asked._replace(bases=last, tolerance=every(_WARM_ROOT_TOLERANCE))
        # The first basis is the identity, from which one QR step gains little.
        from_last = partial(jax.lax.cond, first, lambda: take(asked), lambda: take(warm))
        found = from_last() if self.refreshes_bases else take(asked)
        numbers = [spd.split(jnp.where(found.success, found.residual, jnp.inf), stacks)]
        if repairs and not self.refreshes_bases:
            numbers.append(spd.split(found.fell_back, stacks))
        bases = found.bases or [NOTHING] * len(stacks)
        return [
            Decomposition(SideMemory(root=root, basis=basis), *each)
            for root, basis, *each in zip(found.roots, bases, *numbers, strict=True)
        ]

    def of_diagonal(  # noqa: D102
        self, factor: Diagonal, damping: jax.Array, last: SideMemory
    ) -> SideMemory:
        return last._replace(root=factor.power(self.rule.exponent, damping).stored)


class Exact(Spectrum):
    """The power of the products of eigenvalues, damped as products: ``(a bᵀ + λ)^p``."""


class Measured(Spectrum):
    """The power of a moving average of squared gradients in the eigenbases."""

    keeps_eigen_moment: ClassVar[bool] = True

    def start_second_moment(self, leaf: Kernel, dtype: Any) -> Any:  # noqa: D102
        return jnp.ones((*leaf.stack, *(side.padded_size for side in leaf.sides)), dtype)

    def values(self, memory: LeafMemory) -> jax.Array:  # noqa: D102
        return memory.eigen_moment

    def squares(self, leaf: Kernel, memory: LeafMemory, matrix: jax.Array) -> Any:  # noqa: D102
        row_unit, col_unit = self.units(memory)
        turned = to_eigenbasis(matrix, *roots_of(leaf, memory))
        return jnp.square(turned / jnp.sqrt(row_unit) / jnp.sqrt(col_unit))

    def carry(  # noqa: D102
        self, leaf: Kernel, before: LeafMemory, after: LeafMemory, *, first: jax.Array
    ) -> Any:
        bases = roots_of(leaf, before), roots_of(leaf, after)
        moment = carry_second_moments(before.eigen_moment, *bases)
        for old, new in zip(self.units(before), self.units(after), strict=True):
            moment = moment * (old / new)
        # Moments out of range in the new units start again from the factors, as at the first
        # refresh.
        start = first | ~jnp.isfinite(moment).all()
        return jnp.where(start, self.outer(after), moment)


SPECTRA: Mapping[str, type[Spectrum]] = MappingProxyType(
    {"factored": Factored, "exact": Exact, "measured": Measured}
)


def _identities(matrices: jax.Array, dampings: jax.Array, last: Any) -> Decomposition:
    """Return matrices that change nothing."""
    basis = NOTHING if last is None else last
    root = spd.identity_like(matrices)
    return Decomposition(SideMemory(root=root, basis=basis), jnp.zeros_like(dampings))


class Step(NamedTuple):
    """What the acts of an update (measure, refresh, apply) read.

    Attributes:
      spectrum: decomposes factors and applies the power, by the rule of this update.
      plans: what each leaf is, by its shape and the layout.
      leaves: the same with what this batch's signals say.
      signals: all signals of this batch; None where the gradient must do.
      measure: returns the moments of signals, given what is kept; None where they are ready.
      spread: the devices that share the roots out; None for all roots on every device.
      products: gradients as sums of outer products, by the positions of their leaves.
    """

    spectrum: Spectrum
    plans: Sequence[Leaf]
    leaves: Sequence[Leaf]
    signals: Any
    measure: Callable[[Mapping[str, Any]], Any] | None
    spread: Spread | None = None
    products: Mapping[int, OuterProducts] = MappingProxyType({})
