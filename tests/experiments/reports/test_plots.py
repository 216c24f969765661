"""The picture of one run, seen at the artists that are drawn."""

import numpy as np
import pytest

from optalr.experiments.configs.config import from_table
from optalr.experiments.reports.axes import to_png
from optalr.experiments.reports.plots import draw_run, plot_run
from tests.experiments.made_runs import MadeRun, write_run

LOSSES = np.linspace(3.0, 1.0, 20)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    more = {"phase": [0] * 8 + [1] * 12, "learning_rate": np.geomspace(1.0, 0.01, 20)}
    config = from_table({"method": {"name": "tso_alra"}})
    path = tmp_path_factory.mktemp("runs") / "staged"
    return write_run(path, MadeRun(LOSSES, 5, more, {0: 3.0, 20: 1.0}), config)


@pytest.fixture(scope="module")
def figure(staged):
    return draw_run(staged, "accuracy")


def test_a_run_has_loss_score_rate_and_phase_over_steps(figure):
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels == ["loss", "accuracy", "learning rate", "phase"]
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "linear", "log", "linear"]
    assert [axis.get_xlabel() for axis in figure.axes[2:]] == ["step", "step"]
    assert figure.get_suptitle() == "tso_alra on digits (mlp)"
    steps = list(range(1, 21))
    assert all(axis.lines[0].get_xdata().tolist() == steps for axis in figure.axes)
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), np.geomspace(1.0, 0.01, 20))
    assert figure.axes[3].lines[0].get_ydata().tolist() == [0] * 8 + [1] * 12


def test_the_loss_has_every_minibatch_its_mean_and_the_test_set(figure):
    raw, smooth, tested = figure.axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), LOSSES)
    assert smooth.get_ydata()[-1] == pytest.approx(LOSSES[-10:].mean())
    assert tested.get_xdata().tolist() == [0, 20]
    assert tested.get_ydata().tolist() == [3, 1]
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["train (mean of 10)", "test"]  # there was no validation set


def test_the_second_phase_is_shaded_in_every_axis(figure):
    for axis in figure.axes:
        (shade,) = axis.patches
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == (9, 20)


def test_a_method_without_phases_or_rate_says_so(tmp_path):
    figure = draw_run(write_run(tmp_path / "run", MadeRun(LOSSES, 5)), "accuracy")
    (note,) = figure.axes[3].texts
    assert note.get_text() == "this method has no phases"
    assert figure.axes[2].get_yscale() == "linear"
    assert not any(axis.patches for axis in figure.axes)


def test_the_file_is_the_figure(staged, figure):
    path = plot_run(staged, "accuracy")
    assert path == staged.path / "curves.png"
    assert path.read_bytes() == to_png(draw_run(staged, "accuracy"))
