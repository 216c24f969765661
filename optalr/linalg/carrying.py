"""Carrying moments that are held in one pair of bases over to another.

Bases of a Kronecker-factored matrix are refreshed while running means are kept in them. With
``R = Q_newᵀ Q_old`` on each side, first moments move as ``R_A m R_Bᵀ``, and second moments, which
are the diagonal of a covariance, by the squared entries of both rotations. As in ``kronecker``,
leading dimensions are stacks, and None stands for the identity.
"""

import jax

from optalr.linalg.kronecker import Factor, from_eigenbasis
from optalr.linalg.structured import Matrices, as_structured


@jax.jit
def carry_first_moments(
    moment: jax.Array,
    old: tuple[Factor | None, Factor | None],
    new: tuple[Factor | None, Factor | None],
) -> jax.Array:
    """Return coordinates held in an ``old`` pair of bases in a ``new`` pair, exactly.

    Choose it to keep a momentum in bases that are refreshed. Cost: four products.

    Args:
      moment: ``(..., m, n)``, for instance the mean of ``Q_Aᵀ G Q_B``.
      old: vectors of the left and the right basis that hold it; None for the identity.
      new: vectors of the bases wanted, None on the same sides as ``old``.

    Returns:
      ``(..., m, n)``, the coordinates in the new bases.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import carry_first_moments
      >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> moment = jnp.array([[1.0], [-5.0]])
      >>> carry_first_moments(moment, (jnp.eye(2), None), (swap, None)).tolist()
      [[-5.0], [1.0]]
    """
    left, right = (_rotation(*pair) for pair in zip(old, new, strict=True))
    return from_eigenbasis(moment, left, right)


@jax.jit
def carry_second_moments(
    moment: jax.Array,
    old: tuple[Factor | None, Factor | None],
    new: tuple[Factor | None, Factor | None],
) -> jax.Array:
    """Return second moments held in an ``old`` pair of bases in a ``new`` pair.

    Choose it when bases are refreshed and squared coordinates are averaged in them. A covariance
    that is diagonal in the old bases, with the diagonal ``v``, has in the new ones the diagonal

        v' = (R_A ∘ R_A) v (R_B ∘ R_B)ᵀ,   R = Q_newᵀ Q_old

    Squared rotations are doubly stochastic, so the moments stay nonnegative and keep their sum. A
    change of basis that only permutes or flips columns moves them exactly. (It is common to leave
    ``v`` as it is. That assigns moments to the wrong coordinates once columns trade places.)

    Args:
      moment: ``(..., m, n)``, the mean of ``(Q_Aᵀ G Q_B)²``.
      old: vectors of the left and the right basis that hold it; None for the identity.
      new: vectors of the bases wanted, None on the same sides as ``old``.

    Returns:
      ``(..., m, n)``, the moments in the new bases.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import carry_second_moments
      >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> v = jnp.array([[1.0], [5.0]])
      >>> carry_second_moments(v, (jnp.eye(2), None), (swap, None)).tolist()
      [[5.0], [1.0]]
    """
    left, right = (_rotation(*pair) for pair in zip(old, new, strict=True))
    return from_eigenbasis(
        moment,
        None if left is None else left.squared_entries(),
        None if right is None else right.squared_entries(),
    )


def _rotation(old: Factor | None, new: Factor | None) -> Matrices | None:
    """Return ``Q_newᵀ Q_old``, or None where both are the identity, as for a diagonal factor."""
    if (old is None) is not (new is None):
        raise ValueError("old and new must leave out (None) the same side.")
    if old is None or new is None:
        return None
    before, after = as_structured(old), as_structured(new)
    if isinstance(before, Matrices) and isinstance(after, Matrices):
        return after.T.times(before)
    return None
