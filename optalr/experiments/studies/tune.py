"""Searching the grid that a config states in its ``[tune]`` section."""

import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optalr.experiments.configs.config import Config, to_table
from optalr.experiments.configs.files import override, to_toml
from optalr.experiments.data import load
from optalr.experiments.errors import ExperimentError
from optalr.experiments.records.run_folder import RunFolder, check_free
from optalr.experiments.records.writing import new_folder, write_atomically
from optalr.experiments.studies.size import check_seeds, refuse_endless
from optalr.experiments.studies.sweep import can_sweep, train_grid
from optalr.experiments.training.trainer import Trainer

RESULTS = "results.jsonl"
_RATE = "method.learning_rate"


def grid(config: Config) -> list[dict[str, Any]]:
    """Return the points of a config's grid, each a dict of dotted key to value.

    Raises:
      ExperimentError: there is no grid, an entry is not a list of values, or a key is unknown.
    """
    if not config.tune:
        raise ExperimentError(
            "the config has no [tune] section: add one, for example "
            '"method.learning_rate" = [0.1, 0.01, 0.001].'
        )
    for key, values in config.tune.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise ExperimentError(
                f"tune.{key} must be a list of values, got {values!r}; write the key in quotes, "
                'for example "method.learning_rate" = [0.1, 0.01].'
            )
    refuse_endless(math.prod(map(len, config.tune.values())), "points of the grid")
    points = [
        dict(zip(config.tune, values, strict=True))
        for values in itertools.product(*config.tune.values())
    ]
    for point in points:
        override(config, point)  # a misspelt key shows now, not after an hour
    return points


def tune(config: Config, path: Path, num_seeds: int) -> Iterator[dict[str, Any]]:
    """Train every point of the grid with every seed and yield one row per point.

    A row has the means over seeds, among them the validation loss at the last step, by which
    ``best`` chooses. The test set is not used. Points that the folder's ``results.jsonl`` already
    has are yielded without training, so a search can be interrupted.

    Args:
      config: the experiment, with its grid.
      path: a new folder, or one in which the same search was begun.
      num_seeds: seeds per point, >= 1, from ``train.seed`` on.

    Raises:
      ExperimentError: the grid is bad, there are no seeds or no validation examples, or the folder
        holds something else.
    """
    points = grid(config)
    check_seeds(config.train.seed, num_seeds)
    refuse_endless(len(points) * num_seeds, "runs of the search")
    if config.data.validation_fraction <= 0:
        raise ExperimentError(
            "tuning chooses by the validation loss and there are no validation examples: set "
            "data.validation_fraction."
        )
    folder = _open(path, config, num_seeds)
    with folder.lock():
        yield from _search(config, folder, points, num_seeds=num_seeds)


def _search(
    config: Config, folder: RunFolder, points: list[dict[str, Any]], *, num_seeds: int
) -> Iterator[dict[str, Any]]:
    """Yield one row per point, of those that are known already and of those to be trained."""
    known = {json.dumps(row["point"]): row for row in folder.rows(RESULTS)}
    dataset = load(config.data)
    seeds = range(config.train.seed, config.train.seed + num_seeds)
    for i, point in enumerate(points):
        if json.dumps(point) not in known:
            # Points that share all but the rate share a compiled program, so they go together.
            alike = [other for other in points[i:] if _but_rate(other) == _but_rate(point)]
            missing = [other for other in alike if json.dumps(other) not in known]
            trainer = Trainer(override(config, missing[0]), dataset)
            rows = _train_points(trainer, missing, seeds)
            folder.append(RESULTS, rows)
            known |= {json.dumps(row["point"]): row for row in rows}
        yield known[json.dumps(point)]


def _but_rate(point: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key != _RATE}


def _train_points(
    trainer: Trainer, points: list[dict[str, Any]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Train points that differ in their rate alone, all at once where that is possible.

    Else train only the first, whose trainer this is. The caller finds the others missing again.
    """
    if _RATE in points[0] and can_sweep(trainer):
        found = train_grid(trainer, [float(point[_RATE]) for point in points], seeds)
        return [_means(point, each) for point, each in zip(points, found, strict=True)]
    point = points[0]
    return [_means(point, [train_once(trainer, seed) for seed in seeds])]


def _means(point: dict[str, Any], found: list[dict[str, float]]) -> dict[str, Any]:
    means = {key: float(np.mean([measures[key] for measures in found])) for key in found[0]}
    return {"point": point, "seeds": len(found), **means}


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row with the lowest validation loss; a point that diverged cannot win.

    Args:
      rows: what ``tune`` yielded.

    Raises:
      ExperimentError: every point diverged.
    """
    # `min` would return a NaN that happens to stand first.
    finite = [row for row in rows if math.isfinite(row["validation_loss"])]
    if not finite:
        raise ExperimentError("every point of the grid diverged: add smaller learning rates to it.")
    return min(finite, key=lambda row: row["validation_loss"])


def train_once(trainer: Trainer, seed: int) -> dict[str, float]:
    """Train without a record and return final losses, NaN where training diverged.

    Returns:
      The mean training loss of the last epoch, and the validation loss and score.
    """
    # This trains as `training.loop` does, but without files and evaluations that nothing reads.
    state = trainer.init(seed)
    every = trainer.config.train.evaluate_every
    losses = np.zeros(0)
    while int(state.step) < trainer.total_steps:
        measured, value = [], math.nan
        if (int(state.step) // trainer.steps_per_epoch) % every == 0 and trainer.reads_validation:
            value = trainer.evaluate(state, "validation")["validation_loss"]
        for segment in trainer.segments(state, seed, value):
            state = segment.state
            measured.append(segment.measured["loss"])
        losses = np.concatenate(measured)
        if not np.isfinite(losses).all():
            break
    found = trainer.evaluate(state, "validation")
    return {"train_loss": float(np.mean(losses)), **found}


def _open(path: Path, config: Config, num_seeds: int) -> RunFolder:
    """Open the folder of a search, new or begun. ``tuning.toml`` says what it searches."""
    text = to_toml({"tuning": {"seeds": num_seeds}, **to_table(config)})
    file = path / "tuning.toml"
    if not path.exists():
        check_free(path)
        with new_folder(path) as scratch:
            write_atomically(scratch / file.name, text)
    elif not _says(file, text):
        raise ExperimentError(
            f"{path} exists and holds something else: name another folder with --out."
        )
    return RunFolder(path)


def _says(file: Path, text: str) -> bool:
    """Return whether a TOML file holds what ``text`` holds, however it is written."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")) == tomllib.loads(text)
    except (OSError, ValueError):
        return False
