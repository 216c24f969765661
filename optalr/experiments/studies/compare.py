"""Every config of a folder, over seeds: the runs, and the numbers that sum them up."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optalr.experiments.configs.config import Config, to_table
from optalr.experiments.configs.files import load_config, override, to_toml
from optalr.experiments.data import Dataset, load
from optalr.experiments.errors import ExperimentError, TrainingDivergedError, suggest
from optalr.experiments.records.run_folder import EVALUATIONS, METRICS, RunFolder, write_atomically
from optalr.experiments.reports.plots import column, trailing_mean
from optalr.experiments.training.loop import Report, train
from optalr.experiments.training.objective import OBJECTIVES
from optalr.experiments.training.trainer import Trainer

SPECIFICATION = "comparison.json"
# Minibatch losses jump; a loss counts as reached when the mean of this many steps is there. The
# loss of a full batch, one step an epoch, does not jump and is taken as it is.
WINDOW = 10

ShowProgress = Callable[[str, str, int], Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison on disk: configs, seeds and their runs.

    Attributes:
      path: its folder.
      configs: name to config, in order.
      seeds: the seeds that every config is trained with.
      target: training loss whose first reaching is reported; NaN chooses one (see ``summarize``).
    """

    path: Path
    configs: Mapping[str, Config]
    seeds: tuple[int, ...]
    target: float

    def run_path(self, name: str, seed: int) -> Path:
        """Return the run folder of one config and seed."""
        return self.path / "runs" / f"{name}-seed{seed}"

    def runs(self, name: str) -> list[RunFolder]:
        """Return the finished runs of one config."""
        folders = [RunFolder(self.run_path(name, seed)) for seed in self.seeds]
        return [folder for folder in folders if folder.result() is not None]


@dataclasses.dataclass(frozen=True)
class Curves:
    """What one config's runs measured, a row a seed; runs that diverged are left out.

    Attributes:
      steps: ``(S,)`` step numbers.
      seconds: ``(S,)`` mean training seconds at each step.
      measured: name to ``(seeds, S)``; the loss and score are trailing means.
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


def read_configs(folder: Path, overrides: tuple[str, ...] = ()) -> dict[str, Config]:
    """Return name to config of every TOML file in ``folder``.

    Raises:
      ExperimentError: no such folder, no configs in it, or data that differ between them.
    """
    if not folder.is_dir():
        raise ExperimentError(f"no folder {folder}: name one with .toml files, e.g. configs/digits")
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise ExperimentError(f"{folder} holds no .toml files: name a folder of configs.")
    configs = {path.stem: load_config(path, overrides) for path in files}
    if len({json.dumps(to_table(c)["data"], sort_keys=True) for c in configs.values()}) > 1:
        raise ExperimentError(
            f"the configs in {folder} differ in [data], so their losses cannot be compared: "
            "make the [data] sections equal."
        )
    return configs


def create(path: Path, configs: Mapping[str, Config], num_seeds: int, target: float) -> Comparison:
    """Make the folder of a new comparison.

    Raises:
      ExperimentError: something is there already, or the number of seeds is not positive.
    """
    if num_seeds < 1:
        raise ExperimentError(f"--seeds must be at least 1, got {num_seeds}.")
    if path.exists():
        raise ExperimentError(
            f"{path} exists and is not overwritten: name another folder with --out, or go on with "
            f"`optalr resume {path}`."
        )
    (path / "configs").mkdir(parents=True)
    for name, config in configs.items():
        write_atomically(path / "configs" / f"{name}.toml", to_toml(to_table(config)))
    first = min(config.train.seed for config in configs.values())
    seeds = tuple(range(first, first + num_seeds))
    specification = {"configs": list(configs), "seeds": seeds, "target": _null(target)}
    write_atomically(path / SPECIFICATION, json.dumps(specification, indent=2))
    return Comparison(path, configs, seeds, target)


def open_comparison(path: Path) -> Comparison:
    """Open the folder of an earlier comparison."""
    specification = json.loads((path / SPECIFICATION).read_text(encoding="utf-8"))
    target = specification["target"]
    return Comparison(
        path,
        {name: load_config(path / "configs" / f"{name}.toml") for name in specification["configs"]},
        tuple(specification["seeds"]),
        math.nan if target is None else target,
    )


def select(comparison: Comparison, names: Sequence[str]) -> Comparison:
    """Return the comparison with some of its configs only, in this order.

    Raises:
      ExperimentError: it has no config of that name.
    """
    for name in names:
        if name not in comparison.configs:
            hint = suggest(name, list(comparison.configs))
            raise ExperimentError(f"{comparison.path} has no config {name!r}: {hint}")
    chosen = {name: comparison.configs[name] for name in names}
    return dataclasses.replace(comparison, configs=chosen)


def run_all(comparison: Comparison, show: ShowProgress) -> None:
    """Train what is not yet trained; a run that diverges is recorded and passed over.

    Args:
      comparison: the configs and seeds.
      show: ``show(title, score_name, lines)``, a context manager that yields a report function.
    """
    datasets: dict[str, Dataset] = {}
    total = len(comparison.configs) * len(comparison.seeds)
    done = 0
    for name, config in comparison.configs.items():
        trainer = None
        for seed in comparison.seeds:
            done += 1
            path = comparison.run_path(name, seed)
            if path.exists() and RunFolder(path).result() is not None:
                continue
            if trainer is None:
                key = json.dumps(to_table(config)["data"], sort_keys=True)
                if key not in datasets:
                    datasets[key] = load(config.data)
                trainer = Trainer(config, datasets[key])
                trainer.compile()
            seeded = override(config, {"train.seed": seed})
            folder = RunFolder.open(path) if path.exists() else RunFolder.create(path, seeded)
            with show(
                f"{name} seed {seed} ({done}/{total})", trainer.objective.score_name, 1
            ) as report:
                _train(trainer, folder, report)


def _train(trainer: Trainer, folder: RunFolder, report: Report) -> None:
    with contextlib.suppress(TrainingDivergedError):  # it stands in the result and the table
        train(trainer, folder, report)


def score_name(comparison: Comparison) -> str:
    """Return what the score of the compared task is called."""
    for name in comparison.configs:
        for folder in comparison.runs(name):
            row = folder.rows(METRICS)[0]
            return next(p.score_name for p in OBJECTIVES.values() if p.score_name in row)
    return "accuracy"


def read_curves(comparison: Comparison, name: str, epochs: bool = False) -> Curves | None:
    """Return the curves of one config, or None where no run has finished well.

    Trailing means are over ``WINDOW`` steps (1 where a step is an epoch), with ``epochs`` over
    those of an epoch.
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
        column(tables[0], "step"),
        np.mean([column(table, "seconds") for table in tables], axis=0),
        measured,
        window,
        steps_per_epoch,
        column(evaluations[0], "step"),
        np.mean([column(rows, "seconds") for rows in evaluations], axis=0),
        {key: np.stack([column(rows, key) for rows in evaluations]) for key in evaluated_names},
    )


def summarize(comparison: Comparison) -> tuple[list[dict[str, Any]], float]:
    """Return one row a config, and the training loss whose first reaching is reported.

    Without a target of the user's, that loss is the highest final training loss of any run, so that
    every run reaches it. A row's numbers are ``(mean, standard deviation)`` over seeds.
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

    Final is the mean over seeds of the last trailing mean; NaN where not every seed gets there.
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

    The first steps, whose mean is over fewer than ``curves.window`` losses, do not count.
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


def _null(number: float) -> float | None:
    return None if math.isnan(number) else number
