"""Scaling an experiment down to a laptop, milestones and all."""

import math
from collections.abc import Mapping
from typing import Any

from optalr.experiments.configs.config import Config, from_table, to_table
from optalr.experiments.errors import ExperimentError


def scale_to_budget(config: Config, budget: float) -> Config:
    """Return ``config`` at about ``budget`` times its work.

    Epochs and training examples both shrink by the square root of ``budget``. Whatever is stated
    in epochs (milestones of the schedule, the switch, warm-ups, checkpoints) shrinks with the
    epochs, so that it comes at the same part of the run. Learning rates, batch size and the test
    set stay.

    Args:
      config: the experiment at its full size.
      budget: part of the work, in (0, 1].

    Raises:
      ExperimentError: ``budget`` is not in (0, 1].
    """
    if not 0 < budget <= 1:
        raise ExperimentError(f"--budget must lie in (0, 1], got {budget}: 0.01 is a hundredth.")
    part = math.sqrt(budget)
    table = to_table(config)
    epochs = max(1, round(part * config.train.epochs))
    # Epochs are whole, so milestones follow the number that is really trained.
    shrink = epochs / config.train.epochs
    table["train"]["epochs"] = epochs
    for section, key in (("train", "evaluate_every"), ("record", "checkpoint_every")):
        table[section][key] = max(1, round(shrink * table[section][key]))
    table["data"]["fraction"] *= part
    for section in ("method", "schedule", "phase"):
        table[section] = _shrink_epochs(table[section], shrink)
    table["tune"] = _shrink_epochs(table["tune"], shrink)
    return from_table(table)


def _shrink_epochs(section: Mapping[str, Any], shrink: float) -> dict[str, Any]:
    """Return ``section`` with every ``x_epochs``, a number or a list of them, multiplied."""
    return {
        key: _times(value, shrink) if key.endswith("_epochs") else value
        for key, value in section.items()
    }


def _times(value: Any, shrink: float) -> Any:
    if isinstance(value, (list, tuple)):
        return [_times(item, shrink) for item in value]
    return value * shrink if isinstance(value, (int, float)) else value
