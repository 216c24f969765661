"""Two stages on one rate: the second goes as far along the gradient as the first one went.

A preconditioned direction and the bare gradient have different units. A rate that suits the one
lets the other stand still, or diverge. What the first stage does along the gradient tells which
rate of the second would do the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arrays import moving_average, wide_dtype
from optalr.phases.two_stage import TwoStageState, two_stage
from optalr.transforms.shared.lengths import follow
from optalr.transforms.shared.making import taking_extras

# Some twenty updates: gradients of single batches differ, and the scale of late ones counts.
_DECAY = 0.95


class MeasuredState(NamedTuple):
    """State of a first stage whose updates are measured against the gradient.

    Attributes:
      alignment: float32 scalar, the moving average of ⟨u, g⟩/‖g‖; 0 before the first gradient.
      gradient_norm: float32 scalar, that of ‖g‖.
      inner_state: the state of the stage itself.
    """

    alignment: jax.Array
    gradient_norm: jax.Array
    inner_state: Any


class MatchedState(NamedTuple):
    """State of a second stage whose updates are multiplied by a gain.

    Attributes:
      gain: float32 scalar, what the updates are multiplied by; 1 before the switch.
      inner_state: the state of the stage itself.
    """

    gain: jax.Array
    inner_state: Any


def matched_stages(
    first: optax.GradientTransformation, second: optax.GradientTransformation, phase: Any
) -> optax.GradientTransformationExtraArgs:
    """Apply ``first``, then ``second`` at the rate along the gradient that ``first`` had.

    Choose it instead of ``two_stage`` where one rate stands behind both stages, and their updates
    have different units: a power of F other than −1/2 before SGD, or a loss in units of its own.
    With F^{-1/2} and a mean cross-entropy it changes little (docs/measured/tso_alra.md). With
    ``u`` the updates of ``first`` for the gradients ``g``, means over some twenty updates, and
    ``s`` the updates of ``second``,

        u                           in phase 0
        γ s,   γ = E[⟨u, ĝ⟩]/E[‖g‖],   ĝ = g/‖g‖      in phase 1

    So ``γ g`` is what the first stage's updates were along the gradient, or (with weights 1/‖g‖)
    the least-squares fit of ``u`` by a multiple of ``g``. Along directions in which gradients are
    large SGD then moves about as fast as before, and it keeps still where ``first`` made much of
    little. A matched *length*, E‖u‖/E‖g‖, is four to sixty times larger, and ended in NaN on one of
    five problems.

    γ is taken at the switch, where the phase leaves 0, and stays. It is 1 where nothing has been
    measured (a switch at update 0) or where the mean of ⟨u, ĝ⟩ is not positive. The result does not
    change with the scale of the loss if that of ``first`` does not.

    Args:
      first: the transformation of phase 0, without a learning rate.
      second: the transformation of phase 1, without a learning rate.
      phase: as in ``two_stage``. Between 0 and 1 both stages are blended.

    Returns:
      A transformation that hands extra arguments to both stages. ``optalr.metrics`` shows ``gain``.

    Raises:
      TypeError: a stage is not a gradient transformation.
      ValueError: ``phase`` is a number outside [0, 1].

    Cost: that of ``two_stage``, and three passes over the gradient in phase 0.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.phases.matched_stages(optax.scale(3.0), optax.identity(), optalr.switch_at(1))
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      >>> bool(jnp.allclose(updates["w"], 3 * params["w"])), float(optalr.metrics(state)["phase"])
      (True, 1.0)

    Reference: ours. SWATS (Keskar & Socher 2017) projects the other way, the gradient on the step,
      which is the larger the less the two agree.
    """
    return two_stage(_measured(first), _matched(second), phase, momentum=hand_over_gain)


def hand_over_gain(source: MeasuredState, target: MatchedState) -> MatchedState:
    """Return the second stage's state with the gain that the first one's averages give.

    Args:
      source: the first stage's state.
      target: the second stage's state.
    """
    measured = (source.alignment > 0) & (source.gradient_norm > 0)
    ratio = source.alignment / jnp.where(measured, source.gradient_norm, 1)
    return target._replace(gain=jnp.where(measured & jnp.isfinite(ratio), ratio, 1))


def take_over_gain(state: TwoStageState) -> TwoStageState:
    """Return the state of two stages, with the gain taken that the next update would take.

    A first stage may be released between ``set_phase`` and the first update of phase 1.

    Args:
      state: of any ``two_stage``; those that match nothing are returned as they are.
    """
    if not isinstance(state.second, MatchedState) or not isinstance(state.first, MeasuredState):
        return state
    taken = hand_over_gain(state.first, state.second)
    at_switch = state.steps_since_switch == 0
    return state._replace(
        second=state.second._replace(gain=jnp.where(at_switch, taken.gain, state.second.gain))
    )


def _measured(stage: Any) -> optax.GradientTransformationExtraArgs:
    """Return the stage with averages of how its updates and the gradients agree."""
    inner = taking_extras(stage)

    def init(params: Any) -> MeasuredState:
        zero = jnp.zeros((), jnp.float32)
        return MeasuredState(zero, jnp.zeros_like(zero), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        new, inner_state = inner.update(updates, state.inner_state, params, **extras)
        alignment, norm = _project(new, updates)
        usable = jnp.isfinite(alignment) & jnp.isfinite(norm) & (norm > 0)

        def add(mean: jax.Array, value: jax.Array) -> jax.Array:
            return jnp.where(usable, moving_average(mean, value, _DECAY), mean)

        return new, MeasuredState(
            alignment=add(state.alignment, alignment),
            gradient_norm=add(state.gradient_norm, norm),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _matched(stage: Any) -> optax.GradientTransformationExtraArgs:
    """Return the stage with its updates multiplied by the gain in its state."""
    inner = taking_extras(stage)

    def init(params: Any) -> MatchedState:
        return MatchedState(jnp.ones((), jnp.float32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        new, inner_state = inner.update(updates, state.inner_state, params, **extras)
        return follow(new, -state.gain), state._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _project(updates: Any, gradient: Any) -> tuple[jax.Array, jax.Array]:
    """Return ⟨u, ĝ⟩ and ‖g‖, as float32, for gradients whose squares may be out of range."""
    pairs = [
        (u.astype(wide_dtype(u)), g.astype(wide_dtype(g)))
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(gradient), strict=True)
        if g.size
    ]
    tops = [jnp.max(jnp.abs(g)) for _, g in pairs]
    top = jnp.max(jnp.stack(tops)) if tops else jnp.float32(0)
    unit = jnp.where(top > 0, top, 1)
    total, squares = jnp.zeros_like(unit), jnp.zeros_like(unit)
    for u, g in pairs:
        scaled = g / unit.astype(g.real.dtype)
        total += jnp.sum((scaled.conj() * u).real)
        squares += jnp.sum(jnp.square(jnp.abs(scaled)))
    norm = jnp.sqrt(squares)
    along = total / jnp.where(norm > 0, norm, 1)
    return along.astype(jnp.float32), (norm * unit).astype(jnp.float32)
