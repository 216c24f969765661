"""Linear algebra that is true without an optimizer: arrays or matvecs in, arrays out."""

from optalr.linalg.carrying import carry_first_moments, carry_second_moments
from optalr.linalg.kronecker import (
    apply_eigenbasis_power,
    apply_kronecker,
    eigenbasis_power,
    from_eigenbasis,
    mean_eigenvalue,
    split_damping,
    to_eigenbasis,
)
from optalr.linalg.minres.linear_solve import MinresResult, minres, minres_step
from optalr.linalg.roots.bases import EigenBasis, eigenbasis, refresh_eigenbasis
from optalr.linalg.roots.grouping import inverse_roots
from optalr.linalg.roots.inverse_root import InverseRoot, inverse_root

__all__ = [  # noqa: RUF022  (sorted by theme)
    # Inverse roots.
    "InverseRoot",
    "inverse_root",
    "inverse_roots",
    # Kronecker-factored powers.
    "EigenBasis",
    "apply_eigenbasis_power",
    "apply_kronecker",
    "carry_first_moments",
    "carry_second_moments",
    "eigenbasis",
    "eigenbasis_power",
    "from_eigenbasis",
    "mean_eigenvalue",
    "refresh_eigenbasis",
    "split_damping",
    "to_eigenbasis",
    # Solving with products only.
    "MinresResult",
    "minres",
    "minres_step",
]
