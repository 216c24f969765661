"""When training changes its rule: two stages, phase schedulers, SWATS."""

from optalr.phases.control import release_first_stage, set_phase
from optalr.phases.schedulers import PhaseSchedule, PhaseState, phase_schedule, switch_at
from optalr.phases.two_stage import Released, TwoStageState, two_stage

__all__ = [
    "PhaseSchedule",
    "PhaseState",
    "Released",
    "TwoStageState",
    "phase_schedule",
    "release_first_stage",
    "set_phase",
    "switch_at",
    "two_stage",
]
