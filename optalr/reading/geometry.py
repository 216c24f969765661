"""Testing the paper's arguments on your own model: the noise of directions, and geodesics.

Ida & Fujiwara (2020) rest the two stages on two claims. Theorem 1: steps along F^{-1/2} g follow
geodesics of the statistical manifold. That holds where F is constant; ``geodesic`` shows how far a
model is from it. Theorem 2: F^{-1/2} makes the noise of gradients isotropic, so that training stays
where it is, while plain SGD keeps the noise's own shape. ``noise_spectrum`` measures both.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arguments import check_count, check_interval


class NoiseSpectrum(NamedTuple):
    """The covariance of a direction over minibatches.

    Attributes:
      eigenvalues: float64, falling: the eigenvalues of the sample covariance of k directions of P
        numbers, without those that are zero by construction: ``min(P, k − 1)`` are left.
      mean_norm: norm of the mean direction.
      effective_rank: ``(Σ λ)²/Σ λ²``: the number of directions that noise of this trace would have
        if it were isotropic; at most k − 1.
    """

    eigenvalues: np.ndarray
    mean_norm: float
    effective_rank: float


def noise_spectrum(
    grad_fn: Callable[[Any], Any],
    batches: Iterable[Any],
    direction_fn: Callable[[Any], Any] | None = None,
) -> NoiseSpectrum:
    """Estimate the eigenvalues of a direction's covariance over minibatches.

    Choose it to see what theorem 2 says. For batches of b examples the covariance of the gradient
    is ``C/b``, and that of ``F^{-1/2} g`` is ``I/b`` where F is C.

    Args:
      grad_fn: batch -> gradient, at fixed parameters.
      batches: k >= 2 minibatches of one size.
      direction_fn: gradient -> direction, for instance
        ``lambda g: tx.update(g, opt_state, params, **extras)[0]`` with a fixed state; None for the
        gradient itself.

    Returns:
      A ``NoiseSpectrum``. Unless k is far above P, the eigenvalues spread even for isotropic noise
      (Marchenko & Pastur): compare with another direction over the same batches.

    Raises:
      ValueError: there are fewer than two batches.

    Cost: k gradients and directions, and ``k² P`` flops. The k directions are kept in memory; no
      matrix larger than k × k is formed, whatever the number of parameters P.

    Examples:
      >>> import jax, jax.numpy as jnp, optalr
      >>> keys = jax.random.split(jax.random.key(0), 200)
      >>> scale = jnp.array([3.0, 1.0])
      >>> spectrum = optalr.noise_spectrum(lambda key: scale * jax.random.normal(key, (2,)), keys)
      >>> ratio = spectrum.eigenvalues[0] / spectrum.eigenvalues[1]
      >>> bool(6 < ratio < 12)
      True

    Reference: Ida & Fujiwara 2020, theorem 2 (whose lemma 3 drops the number of examples).
    """
    rows = []
    for batch in batches:
        direction = grad_fn(batch)
        if direction_fn is not None:
            direction = direction_fn(direction)
        leaves = [np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(direction)]
        rows.append(np.concatenate(leaves))
    if len(rows) < 2:
        raise ValueError(f"batches must be at least two to have a covariance, got {len(rows)}.")
    samples = np.stack(rows)
    mean = samples.mean(0)
    centred = samples - mean
    # XᵀX and XXᵀ have the same eigenvalues but for zeros, so the smaller matrix is enough.
    shorter = centred if samples.shape[1] < len(samples) else centred.T
    matrix = shorter.T @ shorter
    values = np.linalg.eigvalsh(matrix / (len(samples) - 1))[::-1]
    values = np.maximum(values[: len(samples) - 1], 0)
    squares = float(np.sum(values**2))
    rank = float(np.sum(values)) ** 2 / squares if squares > 0 else 0.0
    return NoiseSpectrum(values, float(np.linalg.norm(mean)), rank)


class Geodesic(NamedTuple):
    """A curve that solves the geodesic equation, compared with the straight line it starts along.

    Attributes:
      times: ``(n + 1,)``, from 0 to the duration.
      points: ``(n + 1, P)``, the curve.
      velocities: ``(n + 1, P)``, its derivative by time.
      speeds: ``(n + 1,)``, ``√(γ'ᵀ F γ')``; constant up to the error of the integration.
      gaps: ``(n + 1,)``, the distance to ``start + t·velocity``, relative to ``t ‖velocity‖``; 0
        where that is 0.
    """

    times: jax.Array
    points: jax.Array
    velocities: jax.Array
    speeds: jax.Array
    gaps: jax.Array


def geodesic(
    metric_fn: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    velocity: jax.Array,
    *,
    duration: float = 1.0,
    num_steps: int = 100,
) -> Geodesic:
    r"""Integrate the geodesic equation of a metric, for a small model.

    Choose it to see how far a straight step θ + t v is from a geodesic. Theorem 1 takes the one for
    the other, and ``gaps`` is zero where the metric is constant. The equation is

        θ_k'' + Σ_ij Γ^k_ij θ_i' θ_j' = 0,
        Γ^k_ij = ½ Σ_l (F⁻¹)_kl (∂_i F_jl + ∂_j F_il − ∂_l F_ij).

    Args:
      metric_fn: θ ``(P,)`` -> F ``(P, P)``, positive definite and differentiable.
      start: θ(0), ``(P,)``.
      velocity: θ'(0), ``(P,)``, for instance ``-F^{-1/2} g``.
      duration: the time t at which the curve ends, > 0.
      num_steps: steps of the classical Runge-Kutta rule of order 4, >= 1.

    Returns:
      A ``Geodesic``.

    Raises:
      TypeError: ``start`` or ``velocity`` is not of floating point.
      ValueError: ``duration`` or ``num_steps`` is out of range.

    Cost: ``4 num_steps`` times the derivative of the metric (P forward passes) and a solve of about
      ``P³`` flops.

    Examples:
      >>> import jax, jax.numpy as jnp, optalr
      >>> metric = jnp.diag(jnp.array([2.0, 5.0]))
      >>> flat = optalr.geodesic(lambda x: metric, jnp.zeros(2), jnp.ones(2))
      >>> bool(flat.gaps.max() < 1e-5)
      True

      Logistic regression on three points: its Fisher matrix falls as the model becomes certain.

      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, -2.0]])
      >>> def fisher(w):
      ...     p = jax.nn.sigmoid(x @ w)
      ...     return x.T @ (x * (p * (1 - p))[:, None]) / 3
      >>> curve = optalr.geodesic(fisher, jnp.array([0.5, -0.5]), jnp.array([0.2, 0.1]))
      >>> far, half = curve.gaps[-1], curve.gaps[50]  # at twice the length, twice the relative gap
      >>> bool(far > 0.005), bool(1.8 < far / half < 2.4)
      (True, True)

    Reference: Ida & Fujiwara 2020, eq. 7 and 8, lemma 2.
    """
    check_interval("duration", duration, 0, open_low=True)
    check_count("num_steps", num_steps)
    start, velocity = _floating("start", start), _floating("velocity", velocity)
    slope = partial(_slope, metric_fn)
    size = duration / num_steps

    def step(state, _):
        state = _runge_kutta_step(slope, state, size)
        return state, state

    _, (points, velocities) = jax.lax.scan(step, (start, velocity), length=num_steps)
    points = jnp.concatenate([start[None], points])
    velocities = jnp.concatenate([velocity[None], velocities])
    times = jnp.linspace(0.0, duration, num_steps + 1)
    speeds = jnp.sqrt(
        jax.vmap(lambda p, v: jnp.einsum("i,ij,j->", v, metric_fn(p), v))(points, velocities)
    )
    line = start[None] + times[:, None] * velocity[None]
    length = jnp.linalg.norm(velocity) * times
    distance = jnp.linalg.norm(points - line, axis=1)
    gaps = jnp.where(length > 0, distance / jnp.where(length > 0, length, 1), 0)
    return Geodesic(times, points, velocities, speeds, gaps)


# A point and its velocity, or the derivatives of both by time.
_Motion = tuple[jax.Array, jax.Array]


def _slope(metric_fn: Callable[[jax.Array], jax.Array], state: _Motion) -> _Motion:
    """Return ``(θ', θ'')`` of a geodesic."""
    point, speed = state
    change = jax.jacfwd(metric_fn)(point)  # [j, l, i] = ∂_i F_jl
    # The first two terms of Γ are equal once contracted with θ' twice.
    along = jnp.einsum("jli,i,j->l", change, speed, speed)
    across = jnp.einsum("ijl,i,j->l", change, speed, speed)
    return speed, -jnp.linalg.solve(metric_fn(point), along - 0.5 * across)


def _runge_kutta_step(slope: Callable[[_Motion], _Motion], state: _Motion, size: float) -> _Motion:
    """Take one step of the classical rule of order 4."""

    def shifted(change: _Motion, factor: float) -> _Motion:
        point, velocity = (x + factor * dx for x, dx in zip(state, change, strict=True))
        return point, velocity

    k1 = slope(state)
    k2 = slope(shifted(k1, size / 2))
    k3 = slope(shifted(k2, size / 2))
    k4 = slope(shifted(k3, size))
    point, velocity = (
        x + size / 6 * (a + 2 * b + 2 * c + d)
        for x, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
    )
    return point, velocity


def _floating(name: str, value: Any) -> jax.Array:
    """Return ``value`` as an array; raise if it is not of floating point."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be of floating point, got {array.dtype}. Pass {name}.astype(jnp.float32)."
        )
    return array
