"""The numbers that sum up a comparison."""

import math

import numpy as np
import pytest

from optalr.experiments.studies import curves
from optalr.experiments.studies.compare import open_comparison, select
from tests.experiments.made_runs import MadeRun, write_comparison


@pytest.mark.parametrize(("steps_per_epoch", "window"), [(1, 1), (5, curves.WINDOW)])
def test_curves_lie_over_steps_and_seconds_and_full_batches_are_not_smoothed(
    tmp_path, steps_per_epoch, window
):
    run = MadeRun(np.linspace(2.0, 1.0, 21), steps_per_epoch)
    found = curves.read_curves(write_comparison(tmp_path / "made", {"a": [run]}), "a")
    assert found is not None
    assert found.window == window
    assert found.evaluation_seconds.tolist() == [0.0, 10.5]
    step = curves.first_reaching(found, 1.5)[0][0]
    # The mean of ten losses lags by four and a half steps.
    assert step == (11 if window == 1 else 16)


def test_averages_of_epochs_take_an_epochs_steps(tmp_path):
    run = MadeRun(np.arange(20.0), 5)
    found = curves.read_curves(write_comparison(tmp_path / "made", {"a": [run]}), "a", epochs=True)
    assert found is not None
    assert found.window == 5
    assert found.measured["loss"][0, 4::5].tolist() == [2.0, 7.0, 12.0, 17.0]


@pytest.fixture
def two_configs(tmp_path):
    """A fast and a slow config, full batches, two seeds each; one slow run diverged."""
    runs = {
        "fast": [MadeRun([4.0, 1.0, 0.5], 1), MadeRun([4.0, 2.0, 1.0], 1)],
        "slow": [MadeRun([4.0, 3.0, 2.0], 1), MadeRun([4.0, 9.0, 9.0], 1, diverged=True)],
    }
    return write_comparison(tmp_path / "made", runs)


def test_a_summary_has_mean_and_deviation_of_the_runs_that_finished(two_configs):
    rows, target = curves.summarize(two_configs)
    fast, slow = rows
    assert target == 2.0  # the highest final loss, which every finished run reaches
    assert fast["train_loss"] == (0.75, pytest.approx(math.sqrt(0.125)))
    assert (fast["runs"], fast["diverged"], fast["reached"]) == (2, 0, 2)
    assert fast["steps_to_target"] == (2.0, 0.0)
    assert fast["seconds_to_target"] == (1.0, 0.0)
    assert (slow["runs"], slow["diverged"], slow["reached"]) == (2, 1, 1)
    assert slow["train_loss"] == (2.0, 0.0)


def test_a_target_of_the_users_need_not_be_reached(two_configs, tmp_path):
    runs = {"slow": [MadeRun([4.0, 3.0, 2.0], 1)]}
    (row,), target = curves.summarize(write_comparison(tmp_path / "other", runs, target=1.0))
    assert target == 1.0
    assert row["reached"] == 0
    assert all(map(math.isnan, row["steps_to_target"]))


def test_the_matrix_says_who_reaches_whom(two_configs):
    names, steps = curves.reaching_matrix(two_configs)
    assert names == ["fast", "slow"]
    # One fast seed alone gets to the mean final loss, 0.75.
    np.testing.assert_array_equal(steps, [[math.nan, 2.0], [math.nan, 3.0]])


def test_a_comparison_is_read_back_and_cut_down(two_configs):
    again = open_comparison(two_configs.path)
    assert again.configs == two_configs.configs
    assert again.seeds == two_configs.seeds
    assert math.isnan(again.target)
    rows, _ = curves.summarize(select(again, ["slow"]))
    assert [row["config"] for row in rows] == ["slow"]
