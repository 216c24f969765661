"""Pictures of a comparison, seen at the artists that are drawn."""

import numpy as np
import pytest

from optalr.experiments.reports import pictures
from optalr.experiments.studies.compare import select
from tests.experiments.made_runs import MadeRun, write_comparison

SWITCHED = {"phase": [0] * 10 + [1] * 10, "learning_rate": [0.1] * 10 + [0.01] * 10}
CONSTANT = {"learning_rate": [0.2] * 20}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two configs, two seeds, four epochs of five steps; one of them switches half-way."""
    tested = {0: 50.0, 10: 2.0, 20: 1.0}
    runs = {
        "plain": [
            MadeRun(np.linspace(3.0, 1.0, 20), 5, CONSTANT, tested),
            MadeRun(np.linspace(4.0, 2.0, 20), 5, CONSTANT, tested),
        ],
        "staged": [MadeRun(np.linspace(3.0, 0.5, 20), 5, SWITCHED, tested)] * 2,
    }
    return write_comparison(tmp_path_factory.mktemp("comparisons") / "made", runs)


def labels(figure):
    """Return ``(x, y)`` labels of every axis."""
    return [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes]


def line(axis, name):
    """Return the line of one config."""
    (found,) = [line for line in axis.lines if line.get_label() == name]
    return found


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def shades(axis):
    return [(p.get_x(), p.get_x() + p.get_width()) for p in axis.patches]


@pytest.fixture(scope="module")
def everything(comparison):
    return pictures.draw_curves(comparison, "the title", target=1.5)


def test_curves_have_a_labelled_axis_for_everything(everything):
    assert labels(everything) == [
        ("step", "training loss"),
        ("seconds of training", "training loss"),
        ("step", "test loss"),
        ("seconds of training", "test loss"),
        ("step", "test accuracy"),
        ("seconds of training", "test accuracy"),
        ("step", "learning rate"),
        ("step", "phase"),
    ]
    scales = [axis.get_yscale() for axis in everything.axes]
    assert scales == ["log"] * 4 + ["linear"] * 2 + ["log", "linear"]
    assert everything.axes[7].get_ylim() == (-0.05, 1.05)
    assert legend(everything) == ["plain", "staged"]
    assert everything.get_suptitle() == "the title"


def test_curves_are_means_over_seeds_with_bands(everything):
    over_steps, over_seconds = everything.axes[:2]
    assert line(over_steps, "plain").get_xdata().tolist() == list(range(1, 21))
    assert line(over_seconds, "plain").get_xdata()[-1] == 10.0
    # The last mean of ten of both seeds: 1 and 2, and four and a half steps of 2/19 back.
    expected = 1.5 + 4.5 * 2 / 19
    assert line(over_steps, "plain").get_ydata()[-1] == pytest.approx(expected)
    assert line(over_seconds, "plain").get_ydata()[-1] == pytest.approx(expected)
    # One band a config.
    assert len(over_steps.collections) == 2
    assert line(everything.axes[2], "staged").get_xdata().tolist() == [0, 10, 20]
    assert line(everything.axes[2], "staged").get_ydata().tolist() == [50, 2, 1]
    assert line(everything.axes[4], "plain").get_ydata().tolist() == [0.5] * 3


def test_curves_mark_the_target_and_cut_off_the_untrained_loss(everything):
    for axis in everything.axes[:2]:
        target = next(line for line in axis.lines if line.get_linestyle() == ":")
        assert target.get_ydata() == [1.5, 1.5]
    for axis in everything.axes[2:4]:
        assert axis.get_ylim()[1] == pytest.approx(1.15 * 2.0)


def test_curves_shade_the_second_phase_of_the_config_that_has_one(everything):
    for axis in (everything.axes[0], everything.axes[2], everything.axes[4]):
        assert shades(axis) == [(11, 20)]
    assert not shades(everything.axes[1])
    assert line(everything.axes[6], "staged").get_ydata().tolist() == SWITCHED["learning_rate"]
    assert [l.get_label() for l in everything.axes[7].lines] == ["staged"]


def test_losses_are_means_of_epochs(comparison):
    figure = pictures.draw_losses(comparison, "the title")
    trained, tested = figure.axes
    assert labels(figure) == [
        ("epoch", "training loss (mean of an epoch)"),
        ("epoch", "test loss"),
    ]
    assert line(trained, "plain").get_xdata().tolist() == [1, 2, 3, 4]
    losses = np.stack([np.linspace(3.0, 1.0, 20), np.linspace(4.0, 2.0, 20)])
    means = losses.reshape(2, 4, 5).mean((0, 2))
    np.testing.assert_allclose(line(trained, "plain").get_ydata(), means)
    # Not the test loss of the untrained net.
    assert line(tested, "plain").get_xdata().tolist() == [2, 4]
    assert tested.get_ylim()[1] == pytest.approx(1.15 * 2.0)
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "log"]
    assert legend(figure) == ["plain", "staged"]


def test_losses_mark_where_the_second_phase_begins(comparison):
    figure = pictures.draw_losses(comparison, "")
    color = line(figure.axes[0], "staged").get_color()
    for axis in figure.axes:
        (mark,) = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert mark.get_xdata() == [2.0, 2.0]
        assert mark.get_color() == color


def test_rates_are_drawn_over_epochs(comparison):
    figure = pictures.draw_rates(comparison, "the title")
    assert labels(figure) == [("epoch", "training loss"), ("epoch", "learning rate")]
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "log"]
    staged = line(figure.axes[1], "staged")
    assert staged.get_xdata()[[0, -1]].tolist() == [0.2, 4.0]
    # Half-way through the window behind the switch, the geometric mean.
    assert staged.get_ydata()[14] == pytest.approx(np.sqrt(0.1 * 0.01))
    np.testing.assert_allclose(line(figure.axes[1], "plain").get_ydata(), 0.2)


def test_one_constant_rate_stands_in_the_middle(comparison):
    figure = pictures.draw_rates(select(comparison, ["plain"]), "")
    assert figure.axes[1].get_ylim() == pytest.approx((0.1, 0.4))


def test_refused_steps_do_not_count_in_a_mean_rate():
    rates = np.array([[0.1, 0.0, 0.001, 0.0, 0.0]])
    np.testing.assert_allclose(pictures.smooth_rates(rates, 2), [[0.1, 0.1, 0.001, 0.001, np.nan]])


def test_a_config_keeps_its_color_in_every_picture(comparison):
    colors = {
        line(draw(comparison, "").axes[0], "staged").get_color()
        for draw in (pictures.draw_losses, pictures.draw_rates)
    }
    assert len(colors) == 1


def test_a_config_without_a_finished_run_is_left_out(tmp_path):
    runs = {
        "good": [MadeRun([2.0, 1.0], 1, CONSTANT)],
        "bad": [MadeRun([2.0, 9.0], 1, CONSTANT, diverged=True)],
    }
    made = write_comparison(tmp_path / "made", runs)
    assert legend(pictures.draw_curves(made, "", target=1.0)) == ["good"]
    assert legend(pictures.draw_selection(made)) == ["good"]


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    """Runs with one step an epoch or five, short and long, tested at start and end alone."""
    runs = {
        "full": [MadeRun(np.linspace(2.0, 1.0, 4), 1)],
        "mini": [MadeRun(np.linspace(2.0, 0.1, 20), 5)],
        "long": [MadeRun(np.linspace(2.0, 0.1, 75), 5)],
    }
    return write_comparison(tmp_path_factory.mktemp("comparisons") / "lengths", runs)


@pytest.mark.parametrize(
    ("names", "over"),
    [
        (["full", "mini"], ("epoch", "linear", [4, 4])),
        (["mini"], ("step", "linear", [20])),
        (["long", "mini"], ("step", "log", [75, 20])),
    ],
)
def test_full_batches_and_mini_batches_are_drawn_over_epochs(lengths, names, over):
    label, scale, ends = over
    figure = pictures.draw_selection(select(lengths, names))
    over_steps, over_seconds = figure.axes
    assert (over_steps.get_xlabel(), over_steps.get_xscale()) == (label, scale)
    assert [line.get_xdata()[-1] for line in over_steps.lines] == ends
    assert over_seconds.get_xlabel() == "seconds of training"
    assert over_seconds.get_xscale() == "linear"
    assert over_seconds.lines[-1].get_xdata()[-1] == 10.0
    assert over_steps.get_ylabel() == "training loss"
    assert over_steps.get_yscale() == "log"
    assert legend(figure) == names


def test_a_selection_has_the_test_loss_where_it_was_measured_on_the_way(comparison):
    figure = pictures.draw_selection(comparison)
    trained, _, tested, tested_seconds = figure.axes
    assert (trained.get_ylabel(), tested.get_ylabel()) == ("training loss", "test loss")
    assert tested.get_xlabel() == "step"
    assert line(tested, "plain").get_xdata().tolist() == [0, 10, 20]
    assert line(tested_seconds, "plain").get_xdata().tolist() == [0, 5, 10]
    assert tested.get_ylim()[1] == pytest.approx(1.15 * 2.0)
