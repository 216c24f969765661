"""The clocks of phases, for whoever keeps a copy of them on the host: Python's numbers.

A phase that is a function of the step is known beforehand. One that data decide is taken to stay as
it is, until the copy is compared with the device's.
"""

from typing import Any, NamedTuple

import numpy as np

from optalr.clocks import BLEND, FIRST, SECOND, TAKE_OVER
from optalr.phases.switching import CountState, PhaseState, RampState, schedule_state


class PhaseClock(NamedTuple):
    """What is known of the phase of the next updates."""

    scheduled: Any  # float32, the phase that the schedule gives the next update
    override: Any  # float32, the phase set by hand
    overridden: Any  # bool, whether one is set
    ramp: RampState | None  # where the phase is a function of the step

    def stage(self) -> int:
        """Return which stages the next update runs."""
        phase = self.override if self.overridden else self.scheduled
        return FIRST if phase <= 0 else SECOND if phase >= 1 else BLEND

    def after(self) -> "PhaseClock":
        """Return the clock an update later."""
        if self.ramp is None:
            return self
        ramp = self.ramp._replace(count=self.ramp.count + 1)
        # How far between 0 and 1 the device knows.
        scheduled = 0.5 * (ramp.count > ramp.start) + 0.5 * (ramp.count >= ramp.end)
        return self._replace(scheduled=scheduled, ramp=ramp)


class StageClock(NamedTuple):
    """Which stages the next update runs."""

    steps_since_switch: Any  # int32
    hands_over: Any  # bool, whether the second stage takes over a momentum
    phase: PhaseClock

    @property
    def is_certain(self) -> Any:
        """Whether the steps of a ramp are known: they are not in some states of older releases."""
        return self.phase.ramp is None or self.phase.ramp.end >= 0

    def needs(self) -> int:
        """Return what the next update is told."""
        stage = self.phase.stage()
        begins = stage == SECOND and self.hands_over and self.steps_since_switch == 0
        return TAKE_OVER if begins else stage

    def after(self, told: Any) -> "StageClock":
        """Return the clock an update later."""
        steps = self.steps_since_switch + 1 if told != FIRST else 0
        return self._replace(steps_since_switch=steps, phase=self.phase.after())

    def opens(self, told: Any, child: str) -> bool:
        """Return whether an update that is told so runs the stage that is called ``child``."""
        return told in ((FIRST, BLEND) if child == "first" else (BLEND, SECOND, TAKE_OVER))


def stage_clock(node: Any, injected: Any) -> StageClock | None:
    """Return the clock of a ``two_stage``; None where a bare function decides its phase.

    Args:
      node: its state.
      injected: the state of ``optax.inject_hyperparams`` around it, which holds the phase; None
        where the phase is a number.
    """
    phase = _constant(node.phase) if injected is None else _injected(injected)
    return None if phase is None else StageClock(node.steps_since_switch, node.hands_over, phase)


def _constant(phase: Any) -> PhaseClock:
    # NumPy's False, because a state's leaves are told by their positions, which are ints.
    return PhaseClock(phase, 0.0, np.False_, None)


def _injected(node: Any) -> PhaseClock | None:
    schedule = schedule_state(node)
    if schedule is None:
        return _constant(node.hyperparams["phase"])
    if not isinstance(schedule, PhaseState) or isinstance(schedule.schedule, CountState):
        return None
    ramp = schedule.schedule if isinstance(schedule.schedule, RampState) else None
    return PhaseClock(schedule.scheduled, schedule.override, schedule.overridden, ramp)
