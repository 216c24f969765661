"""One update of a learned rate: scalars in, scalars out.

Kept apart from the transformation, so that the rule and its safeguards can be read in one place.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval, from_fields, is_concrete


@dataclasses.dataclass(frozen=True)
class RateSafeguards:
    """What a learned rate does where Newton's rule fails. Each can be switched off with None.

    Where ``f'' > 0`` and nothing is out of proportion none of them acts, however fast the rate
    grows or falls: on a quadratic one update lands on the exact rate. Each acts relative to the
    rate and to the loss, so scaling the loss by c still divides the rates by c.

    Attributes:
      curvature: k > 1. Where the parabola through f, f', f'' has no minimum at a positive rate
        (f'' ≤ 0, or η − f'/f'' ≤ 0), Newton's rule climbs or turns back; η is then multiplied by k
        where f' < 0 and divided by k where f' > 0. Counted as ``nonconvex_probes``.
      runaway: limit ≥ 0. A step that would raise the loss by more than this many times the decrease
        it should bring, ``f(η) − f(0) > limit · η gᵀu``, is not made; the rate becomes
        ``½ η / (1 + (f(η) − f(0)) / (η gᵀu))``, the minimum of the parabola through f(0), f'(0)
        and f(η), and is used at once. On a quadratic this acts above 2(1 + limit) times the best
        rate. Needs the extra ``grad``. Counted as ``runaway_steps``.
      nonfinite: k > 1. Where f(η) is not finite no step is made, and η becomes the lesser of η/k
        and the average rate; where only a derivative is not finite, η stays as it is; a direction
        that is not finite gives a zero update and leaves η alone. Counted as ``failures``. None
        lets NaN through.
      floor: the least rate, > 0. The paper's is 1e-6, too much for a loss that is a sum over many
        examples.
      ceiling: the greatest rate. The paper has none. Counted, with the floor, as ``clipped_rates``.
      max_step: greatest norm of an update, > 0, from the first step on whose loss is above
        ``max_rise`` times the first loss (or not finite); None, the default, for no bound. Try 0.3
        where a net is probed on its own small batches: the steps that fit one batch are too long
        for all others. It depends on the scale of the parameters, which nothing else here does,
        and makes the loss of a quadratic fall more slowly. Needs the extra ``value``. Counted as
        ``bounded_steps``; the rate that is learned stays as it is.
      max_rise: see ``max_step``, >= 0; with 0 the bound holds from the first step on.
    """

    curvature: float | None = 2.0
    runaway: float | None = 1e3
    nonfinite: float | None = 10.0
    floor: float = 1e-12
    ceiling: float = float("inf")
    max_step: float | None = None
    max_rise: float = 1.5

    def __post_init__(self):
        for name in ("curvature", "nonfinite"):
            value = getattr(self, name)
            if value is not None:
                check_interval(name, value, 1.0, open_low=True, remedy="None switches it off.")
        if self.runaway is not None:
            check_interval("runaway", self.runaway, 0.0, remedy="None switches it off.")
        check_interval("floor", self.floor, 0.0, open_low=True, remedy="The paper's is 1e-6.")
        check_interval("ceiling", self.ceiling, self.floor)
        if self.max_step is not None:
            remedy = "None switches it off."
            check_interval("max_step", self.max_step, 0.0, open_low=True, remedy=remedy)
        check_interval("max_rise", self.max_rise, 0.0)

    @classmethod
    def off(cls, floor: float = 1e-6) -> "RateSafeguards":
        """Return the published rule's only safeguard, the floor δ of eq. 19."""
        return cls(curvature=None, runaway=None, nonfinite=None, floor=floor)


def resolve_safeguards(given: "RateSafeguards | Mapping[str, Any] | str | None") -> RateSafeguards:
    """Return the safeguards that ``given`` stands for."""
    if given is None or given == "off":
        return RateSafeguards.off()
    if given == "on":
        return RateSafeguards()
    given = from_fields("safeguards", given, RateSafeguards)
    if not isinstance(given, RateSafeguards):
        raise TypeError(
            f"safeguards must be 'on', 'off', a RateSafeguards or a mapping of its fields, got "
            f"{given!r}."
        )
    return given


class Reading(NamedTuple):
    """What was measured along a ray, scalars.

    Attributes:
      value: f(η); 0 where no loss was evaluated.
      slope: f'(η).
      curvature: f''(η).
      start: f(0), or -inf where unknown.
      decrease: gᵀu, the decrease per unit of rate that the gradient promises; 0 where unknown.
    """

    value: jax.Array
    slope: jax.Array
    curvature: jax.Array
    start: jax.Array
    decrease: jax.Array


class Outcome(NamedTuple):
    """What is decided.

    Attributes:
      applied: the rate of this step.
      next_rate: the rate the next step starts from.
      velocity: the new momentum of the rate.
      nonconvex: bool, whether the curvature safeguard acted.
      runaway: bool, likewise.
      clipped: bool, whether floor or ceiling acted.
      failed: bool, whether something was not finite.
    """

    applied: jax.Array
    next_rate: jax.Array
    velocity: jax.Array
    nonconvex: jax.Array
    runaway: jax.Array
    clipped: jax.Array
    failed: jax.Array

    def unless(self, condition: jax.Array, other: "Outcome") -> "Outcome":
        """Return ``other`` where ``condition`` holds."""
        return jax.tree.map(lambda a, b: jnp.where(condition, b, a), self, other)


def keep(rate: jax.Array, velocity: jax.Array, *, move: bool, failed: bool) -> Outcome:
    """Return the outcome that leaves the rate as it is; ``move`` tells whether to step with it."""
    no = jnp.zeros((), bool)
    applied = rate if move else jnp.zeros_like(rate)
    return Outcome(applied, rate, velocity, no, no, no, jnp.full((), failed))


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a rate answers a reading; the arguments are those of ``scale_by_learned_rate``."""

    order: Any
    meta_rate: Any
    momentum: Any
    lag: bool
    safeguards: RateSafeguards

    def decide(
        self, reading: Reading, rate: jax.Array, velocity: jax.Array, average: jax.Array
    ) -> Outcome:
        """Return the rate to apply and the next one, computed in the reading's precision."""
        kind = reading.slope.dtype
        rate, velocity, average = (x.astype(kind) for x in (rate, velocity, average))
        proposal, nonconvex = self._propose(reading, rate)
        new, factor = proposal, self.safeguards.curvature
        if not (is_concrete(self.momentum) and float(self.momentum) == 0):
            new = proposal + jnp.asarray(self.momentum, kind) * velocity
        if factor is not None:
            new = jnp.where(new > 0, new, rate / factor)
        applied = rate if self.lag else new
        velocity = new - rate
        new, applied, velocity, runaway = self._cut(reading, rate, new, applied, velocity)
        failed = jnp.zeros((), bool)
        if self.safeguards.nonfinite is not None:
            lost = ~jnp.isfinite(reading.value)
            failed = lost | ~jnp.isfinite(reading.slope + reading.curvature + new)
            retreat = jnp.minimum(rate / self.safeguards.nonfinite, average)
            new = jnp.where(failed, jnp.where(lost, retreat, rate), new)
            applied = jnp.where(lost, 0, jnp.where(failed, rate, applied))
            velocity = jnp.where(failed, 0, velocity)
            nonconvex, runaway = nonconvex & ~failed, runaway & ~failed
        bounds = self.safeguards.floor, self.safeguards.ceiling
        within = jnp.clip(new, *bounds)
        if not self.lag:
            applied = jnp.where(applied == new, within, applied)
        return Outcome(
            applied=applied.astype(jnp.float32),
            next_rate=within.astype(jnp.float32),
            velocity=velocity.astype(jnp.float32),
            nonconvex=nonconvex,
            runaway=runaway,
            clipped=within != new,
            failed=failed,
        )

    def _propose(self, reading: Reading, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the next rate without momentum, and whether the curvature safeguard acted."""
        slope, curvature = reading.slope, reading.curvature
        gradient_step = rate - jnp.asarray(self.meta_rate, rate.dtype) * slope
        newton_step = rate - slope / curvature
        second = jnp.asarray(self.order) >= 2
        if is_concrete(self.order):
            proposal = newton_step if int(self.order) == 2 else gradient_step
        else:
            proposal = jnp.where(second, newton_step, gradient_step)
        factor = self.safeguards.curvature
        if factor is None:
            return proposal, jnp.zeros((), bool)
        no_minimum = (second & (curvature <= 0)) | (proposal <= 0)
        downhill = jnp.where(slope < 0, rate * factor, jnp.where(slope > 0, rate / factor, rate))
        return jnp.where(no_minimum, downhill, proposal), no_minimum

    def _cut(self, reading: Reading, rate: Any, new: Any, applied: Any, velocity: Any) -> Any:
        """Replace the rate of a step that would raise the loss out of proportion."""
        if self.safeguards.runaway is None:
            return new, applied, velocity, jnp.zeros((), bool)
        promised = rate * reading.decrease.astype(rate.dtype)
        increase = (reading.value - reading.start.astype(rate.dtype)) / promised
        runaway = (promised > 0) & jnp.isfinite(increase) & (increase > self.safeguards.runaway)
        safe = jnp.where(runaway, rate / (2 * (1 + increase)), rate)
        new, applied = (jnp.where(runaway, safe, x) for x in (new, applied))
        return new, applied, jnp.where(runaway, 0, velocity), runaway
