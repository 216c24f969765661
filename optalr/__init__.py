"""Adaptive learning rates and curvature for JAX, as composable optax transformations."""

from optalr import linalg

__all__ = [
    # Linear algebra that is true without an optimizer.
    "linalg",
]

__version__ = "0.1.0"
