"""What every method for inverse roots gets and returns."""

from typing import Any, NamedTuple

import jax


class RootTask(NamedTuple):
    """A normalized stack, and which root of it to take."""

    matrix: jax.Array  # (..., n, n), finite, symmetric, damped, largest entry in [1/2, 1)
    power: Any  # p: an int where it is whole, a float, or (...) where it is traced
    order: int = 3  # of the coupled Newton iteration
    basis: jax.Array | None = None  # (..., n, n), for methods that start from one


class MethodResult(NamedTuple):
    """What a method returns for a normalized stack."""

    root: jax.Array  # (..., n, n)
    residual: jax.Array  # (...)
    condition: jax.Array  # (...), λ_max/λ_min, at most 1/ε
    num_steps: jax.Array  # (...) int32
    basis: jax.Array | None = None  # (..., n, n), where the method keeps one
