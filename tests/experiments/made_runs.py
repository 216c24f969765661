"""Run folders with numbers that are made up here, for the tests of curves and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optalr.experiments.configs.config import Config
from optalr.experiments.configs.files import override
from optalr.experiments.records.run_folder import EVALUATIONS, METRICS, RunFolder
from optalr.experiments.studies.compare import Comparison, create

SECONDS_A_STEP = 0.5


class MadeRun(NamedTuple):
    """What a run shall have measured.

    Attributes:
      losses: the training loss of every step.
      steps_per_epoch: steps of an epoch.
      more: name to what else was measured at every step, such as ``phase``.
      tested: step to test loss; by default 1.0 before the first step and after the last.
      diverged: whether the run ended badly.
    """

    losses: Sequence[float]
    steps_per_epoch: int
    more: Mapping[str, Sequence[float]] = {}
    tested: Mapping[int, float] | None = None
    diverged: bool = False


def write_run(path: Path, run: MadeRun, config: Config | None = None) -> RunFolder:
    """Write a run folder: half a second a step, and an accuracy of one half throughout."""
    folder = RunFolder.create(path, Config() if config is None else config)
    rows = [
        {
            "step": i + 1,
            "epoch": (i + 1) / run.steps_per_epoch,
            "seconds": SECONDS_A_STEP * (i + 1),
            "loss": float(loss),
            "accuracy": 0.5,
            **{name: float(values[i]) for name, values in run.more.items()},
        }
        for i, loss in enumerate(run.losses)
    ]
    tested = {0: 1.0, len(run.losses): 1.0} if run.tested is None else run.tested
    evaluations = [
        {
            "step": step,
            "seconds": SECONDS_A_STEP * step,
            "test_loss": float(loss),
            "test_accuracy": 0.5,
        }
        for step, loss in tested.items()
    ]
    folder.append(METRICS, rows)
    folder.append(EVALUATIONS, evaluations)
    final = list(tested.values())[-1]
    folder.finish(
        {
            "status": "diverged" if run.diverged else "finished",
            "train_loss": float(run.losses[-1]),
            "test_loss": final,
            "test_accuracy": 0.5,
            "lowest_test_loss": min(tested.values()),
            "seconds": SECONDS_A_STEP * len(run.losses),
        }
    )
    return folder


def write_comparison(
    path: Path, runs: Mapping[str, Sequence[MadeRun]], target: float = np.nan
) -> Comparison:
    """Write a comparison whose every config has these runs, one a seed."""
    num_seeds = max(map(len, runs.values()))
    comparison = create(path, dict.fromkeys(runs, Config()), num_seeds=num_seeds, target=target)
    for name, config in comparison.configs.items():
        for seed, run in enumerate(runs[name]):
            seeded = override(config, {"train.seed": seed})
            write_run(comparison.run_path(name, seed), run, seeded)
    return comparison
