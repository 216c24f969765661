"""When training changes its rule: two stages, what decides the switch, and SWATS."""

from optalr.phases.control import release_first_stage, set_phase
from optalr.phases.matching import MatchedState, MeasuredState, matched_stages
from optalr.phases.momentum import hand_over_momentum
from optalr.phases.plateau import PlateauState, switch_on_plateau
from optalr.phases.swats import SwatsState, swats
from optalr.phases.switching import (
    PhaseSchedule,
    PhaseState,
    blend_between,
    phase_schedule,
    switch_at,
)
from optalr.phases.two_stage import Released, TwoStageState, two_stage

__all__ = [
    "MatchedState",
    "MeasuredState",
    "PhaseSchedule",
    "PhaseState",
    "PlateauState",
    "Released",
    "SwatsState",
    "TwoStageState",
    "blend_between",
    "hand_over_momentum",
    "matched_stages",
    "phase_schedule",
    "release_first_stage",
    "set_phase",
    "swats",
    "switch_at",
    "switch_on_plateau",
    "two_stage",
]
