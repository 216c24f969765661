"""The loss along a ray: ``f(η) = L(w − η u)``, and its first two derivatives at a rate.

The derivatives of ``f`` are inner products of the loss's,

    f'(η) = −uᵀ ∇L(w − η u)        f''(η) = uᵀ ∇²L(w − η u) u

and neither gradient nor Hessian is needed for them: ``η`` is a single number, so differentiating
forward, twice, gives ``f``, ``f'`` and ``f''`` in one pass without memory for activations. Let
``x, x', x''`` be a layer's input and its two derivatives, and ``W, W' = −U`` its weights. Then this
takes the five products ``W x, W x', W' x, W x'', W' x'``, where a gradient takes three.

In: a loss, a point and a direction (``loss_along``). Out: ``RayDerivatives`` at a rate, measured by
``ExactDerivatives`` or ``FiniteDifferences``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval
from optalr.arrays import wide_dtype

Ray = Callable[[jax.Array], jax.Array]


class RayDerivatives(NamedTuple):
    """The loss along a ray at one rate.

    Attributes:
      value: scalar, f(η).
      slope: scalar, f'(η).
      curvature: scalar, f''(η); 0 where only the first derivative was asked for.
    """

    value: jax.Array
    slope: jax.Array
    curvature: jax.Array


@dataclasses.dataclass(frozen=True)
class ExactDerivatives:
    """Differentiate the loss along the ray forward, twice: exact up to rounding.

    Choose it unless the loss has no forward derivative.

    Args:
      smoothing: δ ≥ 0, added to f'' where |f''| ≤ δ. With 0 (the default) nothing is added.

    Cost: five products a layer (three for f' alone) and the memory of a forward pass.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> ray = lambda eta: (1 - 3 * eta) ** 2
      >>> [float(x) for x in optalr.ExactDerivatives().measure(ray, jnp.zeros(()))]
      [1.0, -6.0, 18.0]
    """

    smoothing: float = 0.0

    def __post_init__(self):
        check_interval("smoothing", self.smoothing, 0.0)

    def measure(self, ray: Ray, rate: jax.Array, order: int = 2) -> RayDerivatives:
        """Return f, f' and, if ``order`` is 2, f'' at ``rate``."""

        def slope_and_value(eta: jax.Array) -> tuple[jax.Array, jax.Array]:
            value, slope = jax.jvp(ray, (eta,), (jnp.ones_like(eta),))
            return slope, value

        if order == 1:
            slope, value = slope_and_value(rate)
            return RayDerivatives(value, slope, jnp.zeros_like(slope))
        # The value goes through as aux: as a second output it would get a tangent that is the slope
        # once more.
        slope, curvature, value = jax.jvp(
            slope_and_value, (rate,), (jnp.ones_like(rate),), has_aux=True
        )
        near_zero = jnp.abs(curvature) <= self.smoothing
        return RayDerivatives(
            value, slope, jnp.where(near_zero, curvature + self.smoothing, curvature)
        )


@dataclasses.dataclass(frozen=True)
class FiniteDifferences:
    """Estimate the derivatives from loss values at η, η ± ε and η ± 2ε, as published.

        f' ≈ (f(η+ε) − f(η−ε)) / 2ε            D = f(η+2ε) + f(η−2ε) − 2f(η),  f'' ≈ D / 4ε²

    Choose it for fidelity to the paper, or for a loss that has no forward derivative (a
    ``jax.custom_vjp`` inside). Take care of ε. With the published 1e-5 and float32 losses near 1, D
    is a rounding error of 1e-7, and f'' is that error divided by 4e-10: noise of size 300. A step
    of about 1e-2 (or a tenth of the rate, ``relative=True``) is right in float32.

    Args:
      step: ε > 0.
      relative: whether ε is ``step`` times the rate (at least the smallest normal number).
      smoothing: δ ≥ 0, added to D where D is 0 up to rounding (|D| at most the machine epsilon
        times |f(η)|), eq. 17-18. The paper does not say what it takes for zero. If zero meant
        |D| ≤ δ = 1e-6, nearly every step at ε = 1e-5 would be η ← η − (4ε²/δ) f', which is the
        first-order rule with the meta rate 4e-4.

    Cost: five forward passes (three for f' alone).

    Reference: Ravaut, Gorti, "Faster gradient descent via an adaptive learning rate", eq. 12-18.
    """

    step: float = 1e-5
    relative: bool = False
    smoothing: float = 1e-6

    def __post_init__(self):
        check_interval("step", self.step, 0.0, open_low=True, remedy="The paper takes 1e-5.")
        check_interval("smoothing", self.smoothing, 0.0)

    def measure(self, ray: Ray, rate: jax.Array, order: int = 2) -> RayDerivatives:
        """Return f, f' and, if ``order`` is 2, f'' at ``rate``."""
        step = jnp.asarray(self.step, rate.dtype)
        if self.relative:
            # A rate of zero would make a step of zero, and 0/0.
            step = jnp.maximum(step * jnp.abs(rate), jnp.finfo(rate.dtype).tiny)
        value = ray(rate)
        slope = (ray(rate + step) - ray(rate - step)) / (2 * step)
        if order == 1:
            return RayDerivatives(value, slope, jnp.zeros_like(slope))
        difference = ray(rate + 2 * step) + ray(rate - 2 * step) - 2 * value
        # One unit in the last place of f is what D holds if f does not bend at all.
        near_zero = jnp.abs(difference) <= jnp.finfo(value.dtype).eps * jnp.abs(value)
        difference = jnp.where(near_zero, difference + self.smoothing, difference)
        return RayDerivatives(value, slope, difference / (4 * step**2))


def loss_along(value_fn: Callable[[Any], jax.Array], point: Any, direction: Any) -> Ray:
    """Return the loss along a ray, ``η ↦ value_fn(point − η · direction)``.

    Args:
      value_fn: ``value_fn(params) -> scalar``.
      point: the full parameters.
      direction: a pytree whose leaves are leaves of ``point`` by key path, all of them or some:
        what ``optax.masked`` and ``optax.partition`` leave out moves by zero.

    Returns:
      A function of a scalar. Moved leaves are computed in float32 at least (float64 with a float64
      rate) and handed to ``value_fn`` in their own dtype.

    Raises:
      ValueError: ``direction`` has a leaf that ``point`` lacks, or of another shape.
    """
    # By path rather than by structure: a masked or partitioned direction lacks leaves of the point.
    moves = by_path(direction)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(point)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    strangers = sorted(set(moves) - set(paths))
    if strangers:
        raise ValueError(
            f"updates has leaves that point lacks, the first is {strangers[0]}. The learning rate "
            "probes the loss at point − rate · updates, so updates must have the structure of the "
            "parameters: place the transformation outside of wrappers that flatten or rename."
        )

    def ray(eta: jax.Array) -> jax.Array:
        moved = [
            _move(leaf, moves.get(path), eta, path=path)
            for path, (_, leaf) in zip(paths, leaves, strict=True)
        ]
        value = value_fn(jax.tree_util.tree_unflatten(treedef, moved))
        return jnp.asarray(value).astype(wide_dtype(value))

    return ray


def inner_product(a: Any, b: Any) -> jax.Array:
    """Return Σ aᵢ bᵢ over the leaves of ``a``, paired with those of ``b`` by key path.

    Summed in float32 at least; ``b`` may have leaves that ``a`` lacks.
    """
    others = by_path(b)
    total = jnp.zeros((), jnp.float32)
    for path, leaf in by_path(a).items():
        other = others[path]
        dtype = wide_dtype(leaf, other)
        # A sum of products, because a contraction on explicit mesh axes must name its sharding.
        total = total + jnp.sum(jnp.conj(leaf.astype(dtype)) * other.astype(dtype)).real
    return total


def by_path(tree: Any) -> dict[str, jax.Array]:
    """Map key paths (``jax.tree_util.keystr``) to the leaves of ``tree``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.asarray(leaf) for path, leaf in leaves}


def _move(leaf: Any, move: jax.Array | None, eta: jax.Array, *, path: str) -> Any:
    if move is None:
        return leaf
    leaf = jnp.asarray(leaf)
    if move.shape != leaf.shape:
        raise ValueError(
            f"updates has shape {move.shape} at {path}, where point has {leaf.shape}. Pass the "
            "full parameters as point."
        )
    # The rate is float32 or wider. A half-precision leaf is moved in the rate's dtype, or most of a
    # short step would be rounded away before the leaf's own rounding.
    dtype = jnp.result_type(leaf, move, eta)
    return (leaf.astype(dtype) - eta.astype(dtype) * move.astype(dtype)).astype(leaf.dtype)
