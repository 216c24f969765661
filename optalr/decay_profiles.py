"""Decay profiles of a flow as step-size schedules.

A flow may be asked to carry the loss's derivative ``F`` along any decreasing profile,
``F(t) = ρ(t) F(0)``, instead of ``e^{−t}``. Its steps then point the same way and only their sizes
change: ``η_i = Δt · |χ(t_i)|`` with ``χ = (ln ρ)'``
("Exponentially decaying flows for optimization in deep learning", eq. 7-12).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval


def flow_schedule(
    profile: Callable[[jax.Array], jax.Array],
    time_step: float,
    *,
    start: float = 0.0,
    largest: float = 1.0,
) -> optax.Schedule:
    """Turn a decay profile ``ρ(t)`` into the learning rate of a flow that follows it.

    Choose it for the learning rate of ``edf``: with ``exponential_profile`` the rate is constant,
    with ``linear_profile`` it grows to a full Gauss-Newton step on arrival, with
    ``power_profile`` it falls as ``1/t``. The schedule is ``η_i = Δt |ρ'(t_i)/ρ(t_i)|`` at
    ``t_i = start + i Δt``, cut at ``largest``.

    Args:
      profile: ρ, a positive, decreasing, differentiable function of the time (a JAX scalar).
      time_step: Δt, greater than 0: the flow's time that one step covers.
      start: time of the first step.
      largest: bound on the rate, greater than 0, in force as well where ``ρ`` has reached zero; 1
        is a full step to the solution of the linearized problem.

    Returns:
      A schedule, ``count ↦ η`` in float32.

    Raises:
      ValueError: an argument is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> schedule = flow_schedule(linear_profile, time_step=0.25)
      >>> [round(float(schedule(i)), 4) for i in range(4)]
      [0.25, 0.3333, 0.5, 1.0]

    Reference:
      "Exponentially decaying flows for optimization in deep learning", eq. 8 and 12; there the
      rate carries the sign of χ, here it is positive as optax wants it.
    """
    if not callable(profile):
        raise TypeError(f"profile must be a function of time, got {profile!r}.")
    check_interval("time_step", time_step, 0.0, open_low=True, open_high=True)
    check_interval("start", start)
    check_interval("largest", largest, 0.0, open_low=True)

    def schedule(count: Any) -> jax.Array:
        time = start + jnp.asarray(count, jnp.float32) * time_step
        value, slope = jax.value_and_grad(profile)(time)
        rate = time_step * jnp.abs(slope) / jnp.where(value > 0, value, 1.0)
        usable = (value > 0) & jnp.isfinite(rate)
        return jnp.where(usable, jnp.minimum(rate, largest), largest).astype(jnp.float32)

    return schedule


def exponential_profile(time: jax.Array) -> jax.Array:
    """Return ``ρ = e^{−t}``, whose schedule is the constant ``Δt``; safe up to ``t = 80``.

    For an endless run pass the constant itself as the learning rate.

    Args:
      time: t, ≥ 0.

    Returns:
      ρ(t), 1 at the start.

    Examples:
      >>> float(exponential_profile(0.0))
      1.0
    """
    return jnp.exp(-time)


def linear_profile(time: jax.Array) -> jax.Array:
    """Return ``ρ = 1 − t``, the geodesic's own pace (eq. 6): it arrives at ``t = 1``.

    Args:
      time: t, in [0, 1].

    Returns:
      ρ(t), 1 at the start and 0 on arrival.

    Examples:
      >>> linear_profile(0.25)
      0.75
    """
    return 1.0 - time


def power_profile(power: float) -> Callable[[jax.Array], jax.Array]:
    """Return ``ρ = (1 + t)^{−p}``, whose schedule is ``pΔt/(1 + t)``.

    Args:
      power: p, greater than 0.

    Returns:
      A function of the time t ≥ 0.

    Examples:
      >>> power_profile(2.0)(1.0)
      0.25
    """
    check_interval("power", power, 0.0, open_low=True, open_high=True)
    return lambda time: (1.0 + time) ** -power
