"""Decay profiles of a flow, and the step sizes that follow them.

A flow lets the loss's derivative ``F`` decay as ``e^{−t}``. It can follow any other decreasing
profile, ``F(t) = ρ(t) F(0)``. Its steps then keep their direction and only their sizes change:
``η_i = Δt · |χ(t_i)|`` with ``χ = (ln ρ)'``
("Exponentially decaying flows for optimization in deep learning", eq. 7-12).

For the profiles of this file ``χ`` has a closed form, which is right at all times. For others it is
``ρ'/ρ``, for as long as float32 can distinguish ``ρ`` from zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval, is_concrete

# Where ρ is smaller, its slope may be flushed to zero: float32 ends at 1e-38.
_SMALLEST = 1e-30


def flow_schedule(
    profile: Callable[[jax.Array], jax.Array],
    time_step: float,
    *,
    start: float = 0.0,
    largest: float = 1.0,
) -> optax.Schedule:
    """Turn a decay profile ``ρ(t)`` into the learning rate of a flow that follows it.

    Choose it for the learning rate of ``edf``. With ``exponential_profile`` the rate is constant,
    with ``linear_profile`` it grows to a full Gauss-Newton step on arrival, and with
    ``power_profile`` it falls as ``1/t``. The schedule is ``η_i = Δt |ρ'(t_i)/ρ(t_i)|`` at
    ``t_i = start + i Δt``, cut at ``largest``.

    Where a profile of your own falls below 1e-30 or stops being positive, the rate stays as it was
    just before. That is finite where ``ρ`` underflows, and ``largest`` where it arrives at zero.

    Args:
      profile: ρ, a positive, decreasing, differentiable function of the time (a JAX scalar). The
        check that ρ decreases covers the first step only. Where ρ rises later, the rate is still
        the size of χ.
      time_step: Δt, greater than 0: the flow's time that one step covers.
      start: time of the first step, where ρ must be positive.
      largest: bound on the rate, greater than 0. It also holds where ``ρ`` has reached zero. 1 is a
        full step to the solution of the linearized problem.

    Returns:
      A schedule, ``count ↦ η`` in float32.

    Raises:
      TypeError: ``profile`` is not a function.
      ValueError: an argument is out of range; or the profile is not positive at ``start``, or rises
        from there.

    Cost: a few scalar operations per step. A profile of your own adds its derivative and, once it
      has fallen below 1e-30, another 48 calls.

    Examples:
      >>> import optalr
      >>> schedule = optalr.flow_schedule(optalr.linear_profile, time_step=0.25)
      >>> [round(float(schedule(i)), 4) for i in range(4)]
      [0.25, 0.3333, 0.5, 1.0]

    Reference:
      "Exponentially decaying flows for optimization in deep learning", eq. 8 and 12. There the
      rate carries the sign of χ; here it is positive, as optax expects.
    """
    if not callable(profile):
        raise TypeError(f"profile must be a function of time, got {profile!r}.")
    check_interval("time_step", time_step, 0.0, open_low=True, open_high=True)
    check_interval("start", start)
    check_interval("largest", largest, 0.0, open_low=True)
    decay = _closed_form(profile)
    if decay is None:
        _check_profile(profile, start, time_step)
        decay = _differentiated(profile, start)

    def schedule(count: Any) -> jax.Array:
        rate = time_step * decay(start + jnp.asarray(count, jnp.float32) * time_step)
        usable = jnp.isfinite(rate)
        return jnp.where(usable, jnp.minimum(rate, largest), largest).astype(jnp.float32)

    return schedule


def exponential_profile(time: jax.Array) -> jax.Array:
    """Return ``ρ = e^{−t}``, whose schedule is the constant ``Δt``.

    Choose it for the flow as it is: its loss's derivative decays exponentially.

    Args:
      time: t, at least 0, in units of the flow's time.

    Returns:
      ρ(t), 1 at the start.

    Examples:
      >>> import optalr
      >>> float(optalr.exponential_profile(0.0))
      1.0
    """
    return jnp.exp(-time)


def linear_profile(time: jax.Array) -> jax.Array:
    """Return ``ρ = 1 − t``, the pace of the geodesic (eq. 6): it arrives at ``t = 1``.

    Choose it to arrive after a known number of steps, ``1/Δt``; the rate grows as ``Δt/(1 − t)``.

    Args:
      time: t, in [0, 1], in units of the flow's time.

    Returns:
      ρ(t), 1 at the start and 0 on arrival.

    Examples:
      >>> import optalr
      >>> optalr.linear_profile(0.25)
      0.75
    """
    return 1.0 - time


def power_profile(power: float) -> Callable[[jax.Array], jax.Array]:
    """Return ``ρ = (1 + t)^{−p}``, whose schedule is ``pΔt/(1 + t)``.

    Choose it for a rate that falls as ``1/t``.

    Args:
      power: p, greater than 0.

    Returns:
      A function of the time t, which is at least 0.

    Raises:
      ValueError: ``power`` is not a finite number greater than 0.

    Examples:
      >>> import optalr
      >>> optalr.power_profile(2.0)(1.0)
      0.25
    """
    check_interval("power", power, 0.0, open_low=True, open_high=True)
    return _Power(power)


@dataclasses.dataclass(frozen=True)
class _Power:
    """The profile ``(1 + t)^{−p}``."""

    power: float

    def __call__(self, time: Any) -> Any:
        return (1.0 + time) ** -self.power


def _closed_form(profile: Any) -> Callable[[jax.Array], jax.Array] | None:
    """Return ``t ↦ |χ(t)|`` for a profile of this file, None for any other."""
    if profile is exponential_profile:
        return jnp.ones_like
    if profile is linear_profile:
        return lambda time: 1.0 / jnp.maximum(1.0 - time, 0.0)
    if isinstance(profile, _Power):
        return lambda time: profile.power / (1.0 + time)
    return None


def _differentiated(profile: Any, start: Any) -> Callable[[jax.Array], jax.Array]:
    """Return ``t ↦ |ρ'/ρ|`` by differentiation, at the last time when ρ was large enough."""

    def decay(time: jax.Array) -> jax.Array:
        value, slope = jax.value_and_grad(profile)(_last_usable(profile, start, time))
        return jnp.abs(slope / value)

    return decay


def _last_usable(profile: Any, start: Any, time: jax.Array) -> jax.Array:
    """Return the last time up to ``time`` when a decreasing ρ exceeded ``_SMALLEST``."""

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        usable = profile(middle) > _SMALLEST
        return jnp.where(usable, middle, low), jnp.where(usable, high, middle)

    def bisect(time: jax.Array) -> jax.Array:
        # 48 halvings separate neighbouring numbers of float32 over 2^24 units of time.
        return jax.lax.fori_loop(0, 48, halve, (jnp.full_like(time, start), time))[0]

    return jax.lax.cond(profile(time) > _SMALLEST, lambda t: t, bisect, time)


def _check_profile(profile: Any, start: Any, time_step: Any) -> None:
    """Raise if a profile is not positive or rises; a traced one has no values to check."""
    with jax.ensure_compile_time_eval():
        value, slope = jax.value_and_grad(profile)(jnp.asarray(start, jnp.float32))
        later = profile(jnp.asarray(start + time_step, jnp.float32))
        seen = (value, slope, later)
        if not all(is_concrete(number) for number in seen):
            return
        value, slope, later = (float(number) for number in seen)
    if not 0.0 < value < float("inf"):
        raise ValueError(
            f"profile must be positive, but at start={start!r} it is {value:g}. Start earlier, or "
            "pass a profile that has not arrived there."
        )
    if slope > 0.0 or later > value:
        raise ValueError(
            f"profile must decrease, but it rises from {value:g} at start={start!r}. Pass the "
            "decay ρ(t) of the loss's derivative, not its logarithm or a learning rate."
        )
