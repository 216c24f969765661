"""Searching a grid, one point after another and many rates at once."""

import math

import numpy as np
import pytest

from optalr.experiments.configs.config import from_table
from optalr.experiments.errors import ExperimentError
from optalr.experiments.studies.sweep import can_sweep, train_grid
from optalr.experiments.studies.tune import best, grid, train_once, tune
from optalr.experiments.training.trainer import Trainer

CONFIG = from_table(
    {
        "data": {"limit": 320},
        "model": {"name": "linear"},
        "method": {"name": "adam"},
        "schedule": {"name": "cosine"},
        "train": {"epochs": 2, "batch_size": 64},
        "tune": {"method.learning_rate": [0.1, 0.01], "method.b1": [0.9, 0.5]},
    }
)


def test_a_sweep_is_the_same_training_as_one_by_one():
    trainer = Trainer(CONFIG)
    assert can_sweep(trainer)
    # The rates of the grid, so that searching it below meets a program that is already compiled.
    _, (one, two) = train_grid(trainer, [0.1, 0.01], [0, 1])
    for seed, swept in ((0, one), (1, two)):
        alone = train_once(trainer, seed)
        assert alone.keys() == swept.keys()
        np.testing.assert_allclose(list(alone.values()), list(swept.values()), rtol=1e-4)


def test_methods_with_branches_are_not_swept():
    settings = {"data": {"limit": 320}, "model": {"name": "linear"}}
    tso = from_table({**settings, "method": {"name": "tso_alra"}})
    assert not can_sweep(Trainer(tso))
    assert not can_sweep(Trainer(from_table({**settings, "train": {"loop": "step"}})))


def test_the_grid_is_every_combination_in_order(tmp_path):
    points = grid(CONFIG)
    assert points[0] == {"method.learning_rate": 0.1, "method.b1": 0.9}
    assert len(points) == 4
    rows = list(tune(CONFIG, tmp_path / "tuned", 2))
    assert [row["point"] for row in rows] == points
    assert list(tune(CONFIG, tmp_path / "tuned", 2)) == rows


def test_a_point_that_diverged_cannot_win():
    rows = [{"validation_loss": math.nan}, {"validation_loss": 2.0}, {"validation_loss": 1.0}]
    assert best(rows) is rows[2]
    with pytest.raises(ExperimentError, match="every point of the grid diverged"):
        best(rows[:1])


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"method.learning_rate": 0.1}, "must be a list"),
        ({"method": {"learning_rate": [0.1]}}, "in quotes"),
        ({"train.epoch": [1]}, r"train\.epochs"),
        ({}, r"no \[tune\] section"),
    ],
)
def test_a_bad_grid_is_refused_at_once(entry, wanted):
    with pytest.raises(ExperimentError, match=wanted):
        grid(from_table({"tune": entry}))


def test_tuning_needs_validation_examples(tmp_path):
    config = from_table(
        {"data": {"validation_fraction": 0.0}, "tune": {"method.learning_rate": [0.1]}}
    )
    with pytest.raises(ExperimentError, match=r"set data\.validation_fraction"):
        list(tune(config, tmp_path / "tuned", 1))
