"""One update of a learned rate: scalars in, scalars out.

The rule and its safeguards are apart from the transformation, so that they can be read in one
place.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import is_concrete
from optalr.transforms.learned_rate.safeguards import RateSafeguards


class Reading(NamedTuple):
    """What was measured along a ray: scalars in float32 or wider, all of one dtype."""

    value: jax.Array  # f(η); 0 where no loss was evaluated
    slope: jax.Array  # f'(η)
    curvature: jax.Array  # f''(η)
    start: jax.Array  # f(0), or -inf where unknown
    decrease: jax.Array  # gᵀu, the decrease per unit of rate that the gradient promises, or 0


class RateMemory(NamedTuple):
    """What the rule remembers from update to update: float32 scalars."""

    rate: jax.Array  # the rate that this update starts from
    velocity: jax.Array  # the momentum of the rate
    average: jax.Array  # the geometric mean of recent rates


class Outcome(NamedTuple):
    """What the rule decides, as scalars."""

    applied: jax.Array  # float32, the rate of this step
    next_rate: jax.Array  # float32, the rate that the next step starts from
    velocity: jax.Array  # float32, the new momentum of the rate
    nonconvex: jax.Array  # bool, whether the safeguard on the curvature acted
    runaway: jax.Array  # bool, whether the safeguard against runaway rates acted
    clipped: jax.Array  # bool, whether floor or ceiling acted
    failed: jax.Array  # bool, whether something was not finite

    def unless(self, condition: jax.Array, other: "Outcome") -> "Outcome":
        """Return ``other`` where ``condition`` holds, else this outcome."""
        return jax.tree.map(lambda a, b: jnp.where(condition, b, a), self, other)


def keep_rate(memory: RateMemory) -> Outcome:
    """Return the outcome of a step with the rate at hand, from which nothing is learned."""
    no = jnp.zeros((), bool)
    return Outcome(memory.rate, memory.rate, memory.velocity, no, no, no, no)


def refuse_step(memory: RateMemory) -> Outcome:
    """Return the outcome of a step that is not made and counts as a failure; the rate stays."""
    kept = keep_rate(memory)
    return kept._replace(applied=jnp.zeros_like(memory.rate), failed=jnp.ones((), bool))


@dataclasses.dataclass(frozen=True)
class RateRule:
    """How a rate answers a reading; the arguments are those of ``scale_by_learned_rate``."""

    order: Any
    meta_rate: Any
    momentum: Any
    lag: bool
    safeguards: RateSafeguards

    def decide(self, reading: Reading, memory: RateMemory) -> Outcome:
        """Return the rate to apply and the next one, computed in the reading's precision."""
        memory = RateMemory(*(x.astype(reading.slope.dtype) for x in memory))
        outcome = self._move(reading, memory)
        outcome = self._cut_runaway(outcome, reading, memory)
        outcome = self._retreat(outcome, reading, memory)
        return self._clip(outcome)

    def _move(self, reading: Reading, memory: RateMemory) -> Outcome:
        """Move the rate downhill on the loss, with its momentum."""
        rate, factor = memory.rate, self.safeguards.curvature
        new, nonconvex = self._propose(reading, rate)
        # Without momentum nothing is added: not even 0 times a velocity that is not finite.
        if not (is_concrete(self.momentum) and float(self.momentum) == 0):
            new = self._carried(new, nonconvex, memory)
        if factor is not None:
            new = jnp.where(new > 0, new, rate / factor)
        no = jnp.zeros((), bool)
        applied = rate if self.lag else new
        return Outcome(applied, new, new - rate, nonconvex, runaway=no, clipped=no, failed=no)

    def _carried(self, proposal: jax.Array, nonconvex: jax.Array, memory: RateMemory) -> jax.Array:
        """Return the proposal with the momentum added to it."""
        carried = proposal + jnp.asarray(self.momentum, proposal.dtype) * memory.velocity
        if self.safeguards.max_drag is None:
            return carried
        # A rate that a safeguard set is no step of Newton's: nothing carries it further.
        share = jnp.where(nonconvex, 0, self.safeguards.max_drag).astype(proposal.dtype)
        held = jnp.clip(carried, (1 - share) * proposal, proposal)
        # Of order 1 the proposal is a small step downhill, and no minimum to stay below.
        return jnp.where(jnp.asarray(self.order) >= 2, held, carried)

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

    def _cut_runaway(self, outcome: Outcome, reading: Reading, memory: RateMemory) -> Outcome:
        """Replace the rate of a step that would raise the loss out of proportion."""
        if self.safeguards.runaway is None:
            return outcome
        rate = memory.rate
        promised = rate * reading.decrease.astype(rate.dtype)
        increase = (reading.value - reading.start.astype(rate.dtype)) / promised
        runaway = (promised > 0) & jnp.isfinite(increase) & (increase > self.safeguards.runaway)
        # The minimum of the parabola through f(0), f'(0) = −gᵀu and f(η).
        safe = jnp.where(runaway, rate / (2 * (1 + increase)), rate)
        return outcome._replace(
            applied=jnp.where(runaway, safe, outcome.applied),
            next_rate=jnp.where(runaway, safe, outcome.next_rate),
            velocity=jnp.where(runaway, 0, outcome.velocity),
            runaway=runaway,
        )

    def _retreat(self, outcome: Outcome, reading: Reading, memory: RateMemory) -> Outcome:
        """Go back to a smaller rate where the loss is not finite, and learn nothing from it."""
        factor = self.safeguards.nonfinite
        if factor is None:
            return outcome
        lost = ~jnp.isfinite(reading.value)
        failed = lost | ~jnp.isfinite(reading.slope + reading.curvature + outcome.next_rate)
        # The average has worked before. A rate far above it would be divided many times over.
        retreat = jnp.minimum(memory.rate / factor, memory.average)
        next_rate = jnp.where(lost, retreat, memory.rate)
        return outcome._replace(
            applied=jnp.where(lost, 0, jnp.where(failed, memory.rate, outcome.applied)),
            next_rate=jnp.where(failed, next_rate, outcome.next_rate),
            velocity=jnp.where(failed, 0, outcome.velocity),
            nonconvex=outcome.nonconvex & ~failed,
            runaway=outcome.runaway & ~failed,
            failed=failed,
        )

    def _clip(self, outcome: Outcome) -> Outcome:
        """Bring the rate back to the floor or the ceiling; the state holds it in float32."""
        new, applied = outcome.next_rate, outcome.applied
        within = jnp.clip(new, self.safeguards.floor, self.safeguards.ceiling)
        if not self.lag:
            # A refused or shortened step has a rate of its own, which stays.
            applied = jnp.where(applied == new, within, applied)
        return outcome._replace(
            applied=applied.astype(jnp.float32),
            next_rate=within.astype(jnp.float32),
            velocity=outcome.velocity.astype(jnp.float32),
            clipped=within != new,
        )
