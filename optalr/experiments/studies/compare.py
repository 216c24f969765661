"""Every config of a folder, trained over seeds: a comparison on disk and its runs.

    configs/NAME.toml       the configs, resolved
    comparison.json         their order, the seeds, the target
    runs/NAME-seedN/        one run folder each

``curves.py`` reads what the runs measured.
"""

import contextlib
import dataclasses
import functools
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optalr.experiments.configs.config import Config, to_table
from optalr.experiments.configs.files import load_config, override, to_toml
from optalr.experiments.data import Dataset, load
from optalr.experiments.errors import ExperimentError, TrainingDivergedError, suggest
from optalr.experiments.records.locks import locked
from optalr.experiments.records.run_folder import RunFolder, check_free
from optalr.experiments.records.signals import Interruption
from optalr.experiments.records.writing import new_folder, write_atomically
from optalr.experiments.studies.parallel import resume_side_by_side
from optalr.experiments.studies.size import check_seeds, refuse_endless
from optalr.experiments.training.loop import train
from optalr.experiments.training.trainer import Trainer

SPECIFICATION = "comparison.json"

ShowProgress = Callable[[str, str, int], Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison on disk: configs, seeds and their runs.

    Attributes:
      path: its folder.
      configs: name to config, in the order of tables and pictures.
      seeds: the seeds that every config is trained with.
      target: the training loss of which the report says when it is first reached; NaN leaves the
        choice to ``curves.summarize``.
    """

    path: Path
    configs: Mapping[str, Config]
    seeds: tuple[int, ...]
    target: float

    def run_path(self, name: str, seed: int) -> Path:
        """Return the run folder of one config and seed."""
        return self.path / "runs" / f"{name}-seed{seed}"

    def runs(self, name: str) -> list[RunFolder]:
        """Return the runs of one config that have come to an end, well or not."""
        folders = [RunFolder(self.run_path(name, seed)) for seed in self.seeds]
        return [folder for folder in folders if folder.result() is not None]


def read_configs(folder: Path, overrides: tuple[str, ...] = ()) -> dict[str, Config]:
    """Return name to config of every TOML file in ``folder``.

    Raises:
      ExperimentError: the folder is missing or holds no configs, or their data differ.
    """
    if not folder.is_dir():
        raise ExperimentError(f"no folder {folder}: name one with .toml files, e.g. configs/digits")
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise ExperimentError(f"{folder} holds no .toml files: name a folder of configs.")
    configs = {path.stem: load_config(path, overrides) for path in files}
    if len({_data_settings(config) for config in configs.values()}) > 1:
        raise ExperimentError(
            f"the configs in {folder} differ in [data], so their losses cannot be compared: "
            "make the [data] sections equal."
        )
    return configs


def create(
    path: Path, configs: Mapping[str, Config], *, num_seeds: int, target: float
) -> Comparison:
    """Make the folder of a new comparison.

    Args:
      path: the folder, which must not exist.
      configs: name to config.
      num_seeds: seeds per config, >= 1, from the lowest ``train.seed`` of the configs on.
      target: as in ``Comparison``.

    Raises:
      ExperimentError: something is there already, the number of seeds is not positive, or the
        target is infinite.
    """
    first = min(config.train.seed for config in configs.values())
    check_seeds(first, num_seeds)
    refuse_endless(len(configs) * num_seeds, "runs of the comparison")
    if math.isinf(target):
        raise ExperimentError(f"--target must be a finite training loss, got {target}.")
    check_free(path)
    seeds = tuple(range(first, first + num_seeds))
    # JSON has no NaN.
    target_or_null = None if math.isnan(target) else target
    specification = {"configs": list(configs), "seeds": seeds, "target": target_or_null}
    with new_folder(path) as scratch:
        (scratch / "configs").mkdir()
        for name, config in configs.items():
            write_atomically(scratch / "configs" / f"{name}.toml", to_toml(to_table(config)))
        write_atomically(scratch / SPECIFICATION, json.dumps(specification, indent=2))
    return Comparison(path, configs, seeds, target)


def open_comparison(path: Path) -> Comparison:
    """Open the folder of an earlier comparison.

    Raises:
      ExperimentError: its list of configs and seeds is damaged.
    """
    try:
        specification = json.loads((path / SPECIFICATION).read_text(encoding="utf-8"))
        names, target = specification["configs"], specification["target"]
        seeds = tuple(map(operator.index, specification["seeds"]))
        target = math.nan if target is None else float(target)
    except (ValueError, TypeError, KeyError) as error:
        raise ExperimentError(
            f"{path / SPECIFICATION} is damaged ({error}): it must list configs, seeds and target."
        ) from None
    configs = {name: load_config(path / "configs" / f"{name}.toml") for name in names}
    return Comparison(path, configs, seeds, target)


def select(comparison: Comparison, names: Sequence[str]) -> Comparison:
    """Return the comparison with only the configs ``names``, in this order.

    Raises:
      ExperimentError: it has no config of one of these names.
    """
    for name in names:
        if name not in comparison.configs:
            hint = suggest(name, list(comparison.configs))
            raise ExperimentError(f"{comparison.path} has no config {name!r}: {hint}")
    chosen = {name: comparison.configs[name] for name in names}
    return dataclasses.replace(comparison, configs=chosen)


def run_all(
    comparison: Comparison, show: ShowProgress, *, force: bool = False, jobs: int = 1
) -> None:
    """Train what is not yet trained. A run that diverges is recorded, and the next one follows.

    Args:
      comparison: the configs and seeds.
      show: ``show(title, score_name, lines)``, a context manager that yields a report function.
      force: go on from checkpoints of other settings as well.
      jobs: how many runs to train at once, each in a process of its own; 1 trains one after another
        in this process.

    Raises:
      Interruption: a signal asked to stop.
      ExperimentError: another process is at work on the comparison, or a run cannot go on.
    """
    with locked(comparison.path):
        try:
            if jobs == 1:
                _run_in_order(comparison, show, force=force)
            else:
                _run_at_once(comparison, jobs=jobs, force=force)
        except Interruption as error:
            remedy = f"interrupted; go on with `optalr resume {comparison.path}`."
            raise Interruption(error.number, remedy) from None


def _run_at_once(comparison: Comparison, *, jobs: int, force: bool) -> None:
    unfinished = []
    for name, config in comparison.configs.items():
        for seed in comparison.seeds:
            folder = _folder(comparison, name, override(config, {"train.seed": seed}))
            if folder.result() is None:
                unfinished.append(folder.path)
    resume_side_by_side(unfinished, jobs, print, force=force)


def _folder(comparison: Comparison, name: str, config: Config) -> RunFolder:
    """Return the run folder of a config with its seed, which is made if it is not there."""
    path = comparison.run_path(name, config.train.seed)
    return RunFolder.open(path) if path.exists() else RunFolder.create(path, config)


def _run_in_order(comparison: Comparison, show: ShowProgress, *, force: bool) -> None:
    go_on = functools.partial(train, force=True) if force else train
    datasets: dict[str, Dataset] = {}
    total = len(comparison.configs) * len(comparison.seeds)
    done = 0
    for name, config in comparison.configs.items():
        # One trainer serves all seeds of a config, so that its step is compiled once. It is made
        # only when a seed needs it, so that resuming a finished comparison costs nothing.
        trainer = None
        for seed in comparison.seeds:
            done += 1
            path = comparison.run_path(name, seed)
            if path.exists() and RunFolder(path).result() is not None:
                continue
            if trainer is None:
                settings = _data_settings(config)
                if settings not in datasets:
                    datasets[settings] = load(config.data)
                trainer = Trainer(config, datasets[settings])
                trainer.compile()
            folder = _folder(comparison, name, override(config, {"train.seed": seed}))
            title = f"{name} seed {seed} ({done}/{total})"
            with (
                show(title, trainer.objective.score_name, 1) as report,
                contextlib.suppress(TrainingDivergedError),  # the run's result and the table say it
            ):
                go_on(trainer, folder, report)


def _data_settings(config: Config) -> str:
    """Return the data section as a text that is equal for equal data."""
    return json.dumps(to_table(config)["data"], sort_keys=True, default=str)
