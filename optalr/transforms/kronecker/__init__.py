"""Preconditioning by a power of the Kronecker-factored Fisher matrix."""

from optalr.transforms.kronecker.options import KroneckerOptions
from optalr.transforms.kronecker.transform import KroneckerState, scale_by_kronecker

__all__ = ["KroneckerOptions", "KroneckerState", "scale_by_kronecker"]
