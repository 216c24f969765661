"""Switching when the validation loss no longer falls."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_count, check_interval, require_extra
from optalr.phases.switching import PhaseSchedule, phase_schedule
from optalr.states import count_up


class PlateauState(NamedTuple):
    """State of ``switch_on_plateau``.

    Attributes:
      switched: bool scalar, whether the plateau has been reached.
      best: float32 scalar, the value that a measurement has to beat; 0 before the first.
      num_bad: int32 scalar, measurements since the last that beat it.
      num_measurements: int32 scalar, measurements so far.
    """

    switched: jax.Array
    best: jax.Array
    num_bad: jax.Array
    num_measurements: jax.Array


def switch_on_plateau(
    *,
    patience: int = 5,
    rtol: float = 1e-4,
    atol: float = 0.0,
    cooldown: int = 0,
) -> PhaseSchedule:
    """Switch to the second stage when the validation loss has stopped falling.

    Choose it where the switch point is not known and a validation loss is measured now and then.
    A measurement ``v`` counts as progress if

        v < best − (rtol · |best| + atol),

    which is right for losses of either sign. Then ``best ← v``. After ``patience`` measurements
    without progress in a row the phase becomes 1, from the next update on. It stays 1 unless
    ``set_phase`` takes it back.

    Measurements arrive as the extra argument ``validation_value`` of ``update``: a pair ``(value,
    is_new)`` of a float32 and a bool scalar, or a float32 scalar alone, which is NaN in steps
    without a new one. (None would compile another program.) NaN is no measurement, so a run whose
    validation loss is NaN never switches. An infinite loss counts as no progress.

    Args:
      patience: measurements without progress before the switch, at least 1.
      rtol: the progress that counts, relative to the best value, in [0, 1].
      atol: the progress that counts, in the units of the loss, at least 0.
      cooldown: measurements at the start of the schedule's clock that never count as bad (they do
        set ``best``), at least 0. In a nested ``two_stage`` that clock starts at the outer switch,
        right after which a loss may jump.

    Returns:
      A stateful schedule for the ``phase`` of ``two_stage``.

    Raises:
      TypeError: ``patience`` or ``cooldown`` is not a whole number; or ``update`` got no
        ``validation_value``.
      ValueError: an argument lies outside its range.

    Cost: a few scalar operations a step.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> schedule = optalr.switch_on_plateau(patience=2)
      >>> state, phases = schedule.init(), []
      >>> for loss, is_new in [(-1, True), (-2, True), (0, False), (-1.9, True), (-1.5, True)]:
      ...     measured = jnp.float32(loss), jnp.bool_(is_new)
      ...     state = schedule.update(state, validation_value=measured)
      ...     phases.append(float(schedule(state)))
      >>> phases
      [0.0, 0.0, 0.0, 0.0, 1.0]

    Reference: Ida, Fujiwara, "Improving Generalization Performance of Adaptive Learning Rate by
      Switching from Block Diagonal Matrix Preconditioning to SGD", 2020, section III-B: "when the
      minimum validation loss is not altered over several epochs".
    """
    check_count("patience", patience, 1)
    check_interval("rtol", rtol, 0.0, 1.0)
    check_interval("atol", atol, 0.0)
    check_count("cooldown", cooldown, 0)
    rule = _Plateau(patience=patience, rtol=rtol, atol=atol, cooldown=cooldown)
    return phase_schedule(rule)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Plateau:
    """The rule of ``switch_on_plateau``, as a stateful schedule."""

    patience: int
    rtol: float
    atol: float
    cooldown: int

    def init(self) -> PlateauState:
        return PlateauState(
            switched=jnp.zeros((), bool),
            best=jnp.zeros((), jnp.float32),
            num_bad=jnp.zeros((), jnp.int32),
            num_measurements=jnp.zeros((), jnp.int32),
        )

    def update(self, state: PlateauState, **extra_args: Any) -> PlateauState:
        value, measured = _measurement(extra_args)
        first = state.num_measurements == 0
        # An infinite best minus a share of itself is NaN, which nothing would beat.
        margin = jnp.where(jnp.isinf(state.best), 0.0, self.rtol * jnp.abs(state.best))
        better = value < state.best - (margin + self.atol)
        lower = measured & (first | better)
        progress = lower & jnp.isfinite(value)
        judged = measured & (state.num_measurements >= self.cooldown)
        num_bad = jnp.where(judged, count_up(state.num_bad), state.num_bad)
        num_bad = jnp.where(progress, 0, num_bad)
        return PlateauState(
            switched=state.switched | (num_bad >= self.patience),
            best=jnp.where(lower, value, state.best),
            num_bad=num_bad,
            num_measurements=jnp.where(
                measured, count_up(state.num_measurements), state.num_measurements
            ),
        )

    def __call__(self, state: PlateauState, **extra_args: Any) -> jax.Array:
        del extra_args
        return state.switched


def _measurement(extra_args: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Return the validation loss, and whether it is a new one."""
    given = require_extra(
        extra_args,
        "validation_value",
        "switch_on_plateau",
        "Pass validation_value=loss to update: NaN in steps without a new loss, or a pair "
        "(loss, is_new).",
    )
    value, is_new = given if isinstance(given, tuple | list) else (given, True)
    value = jnp.asarray(value).astype(jnp.float32)
    return value, ~jnp.isnan(value) & jnp.asarray(is_new)
