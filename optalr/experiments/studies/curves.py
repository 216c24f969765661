"""What the runs of a comparison measured, and the numbers that sum them up."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optalr.experiments.records.run_folder import EVALUATIONS, METRICS
from optalr.experiments.studies.compare import Comparison
from optalr.experiments.studies.series import column, trailing_mean
from optalr.experiments.training.objective import OBJECTIVES

# Minibatch losses jump, so a loss counts as reached when the mean of this many steps reaches it.
# The loss of a full batch, one step per epoch, does not jump and is taken as it is.
WINDOW = 10


@dataclasses.dataclass(frozen=True)
class Curves:
    """What one config's runs measured, one row per seed; runs that diverged are left out.

    Attributes:
      steps: ``(S,)`` step numbers.
      seconds: ``(S,)`` mean training seconds at each step.
      measured: name to ``(seeds, S)``; the loss and the score are trailing means.
      window: steps of the trailing means.
      steps_per_epoch: steps of an epoch.
      evaluation_steps: ``(E,)`` steps of the evaluations.
      evaluation_seconds: ``(E,)`` mean training seconds at the evaluations.
      evaluated: name to ``(seeds, E)``.
    """

    steps: np.ndarray
    seconds: np.ndarray
    measured: Mapping[str, np.ndarray]
    window: int
    steps_per_epoch: int
    evaluation_steps: np.ndarray
    evaluation_seconds: np.ndarray
    evaluated: Mapping[str, np.ndarray]


def score_name(comparison: Comparison) -> str:
    """Return what the score of the compared task is called."""
    for name in comparison.configs:
        for folder in comparison.runs(name):
            row = folder.rows(METRICS)[0]
            return next(p.score_name for p in OBJECTIVES.values() if p.score_name in row)
    return "accuracy"


def read_curves(comparison: Comparison, name: str, *, epochs: bool = False) -> Curves | None:
    """Return the curves of one config, or None where no run has finished well.

    Args:
      comparison: the runs on disk.
      name: the name of the config.
      epochs: take trailing means over the steps of an epoch, instead of over ``WINDOW`` steps.
        Where an epoch is one step, nothing is averaged either way.
    """
    finished = [
        folder
        for folder in comparison.runs(name)
        if (folder.result() or {})["status"] == "finished"
    ]
    if not finished:
        return None
    tables = [folder.rows(METRICS) for folder in finished]
    evaluations = [folder.rows(EVALUATIONS) for folder in finished]
    smooth = ("loss", score_name(comparison))
    steps_per_epoch = round(tables[0][0]["step"] / tables[0][0]["epoch"])
    window = steps_per_epoch if epochs or steps_per_epoch == 1 else WINDOW
    names = [key for key in tables[0][0] if key not in ("step", "epoch", "seconds")]
    measured = {}
    for key in names:
        rows = [column(table, key) for table in tables]
        measured[key] = np.stack([trailing_mean(r, window) if key in smooth else r for r in rows])
    evaluated_names = [key for key in evaluations[0][0] if key.startswith(("validation", "test"))]
    return Curves(
        steps=column(tables[0], "step"),
        seconds=np.mean([column(table, "seconds") for table in tables], axis=0),
        measured=measured,
        window=window,
        steps_per_epoch=steps_per_epoch,
        evaluation_steps=column(evaluations[0], "step"),
        evaluation_seconds=np.mean([column(rows, "seconds") for rows in evaluations], axis=0),
        evaluated={
            key: np.stack([column(rows, key) for rows in evaluations]) for key in evaluated_names
        },
    )


def summarize(comparison: Comparison) -> tuple[list[dict[str, Any]], float]:
    """Return one row per config, and the target: a training loss that the rows time.

    If the user sets none, the target is the highest final training loss of any run, which
    every run reaches. A row's numbers are ``(mean, standard deviation)`` over seeds.
    """
    curves = {name: read_curves(comparison, name) for name in comparison.configs}
    finals = [float(np.max(c.measured["loss"][:, -1])) for c in curves.values() if c]
    target = comparison.target
    if math.isnan(target) and finals:
        target = max(finals)
    score = score_name(comparison)
    rows = []
    for name, curve in curves.items():
        results = [folder.result() or {} for folder in comparison.runs(name)]
        finished = [r for r in results if r["status"] == "finished"]
        row: dict[str, Any] = {
            "config": name,
            "runs": len(results),
            "diverged": len(results) - len(finished),
        }
        for key in ("train_loss", "test_loss", f"test_{score}", "lowest_test_loss", "seconds"):
            row[key] = mean_std([result[key] for result in finished])
        reached = first_reaching(curve, target) if curve else []
        row["reached"] = len(reached)
        row["steps_to_target"] = mean_std([step for step, _ in reached])
        row["seconds_to_target"] = mean_std([seconds for _, seconds in reached])
        rows.append(row)
    return rows, target


def reaching_matrix(comparison: Comparison) -> tuple[list[str], list[list[float]]]:
    """Return the mean step at which each config (row) reaches the final loss of each (column).

    The final loss is the last trailing mean, averaged over seeds. An entry is NaN where not every
    seed gets there: a mean over the lucky ones would flatter the config.
    """
    curves = {n: c for n in comparison.configs if (c := read_curves(comparison, n)) is not None}
    finals = [float(np.mean(curve.measured["loss"][:, -1])) for curve in curves.values()]
    table = []
    for curve in curves.values():
        row = []
        for final in finals:
            reached = first_reaching(curve, final)
            whole = len(reached) == len(curve.measured["loss"])
            row.append(float(np.mean([step for step, _ in reached])) if whole else math.nan)
        table.append(row)
    return list(curves), table


def first_reaching(curves: Curves, target: float) -> list[tuple[float, float]]:
    """Return ``(step, seconds)`` at which each seed's loss first reaches ``target``, if it does.

    The first steps do not count: their mean is over fewer than ``curves.window`` losses, and one
    lucky minibatch could pass for a fast start.
    """
    found = []
    for losses in curves.measured["loss"]:
        hits = np.flatnonzero(losses[curves.window - 1 :] <= target)
        if len(hits):
            at = hits[0] + curves.window - 1
            found.append((float(curves.steps[at]), float(curves.seconds[at])))
    return found


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (0 for a single value, NaN for none)."""
    if not values:
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
