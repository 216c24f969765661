"""What all pictures share, seen at the artists that it leaves on an axis."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from optalr.experiments.reports import axes


@pytest.fixture
def axis():
    return Figure(layout="constrained").subplots()


def shades(axis):
    """Return start, end and opacity of every shaded stretch."""
    return [(p.get_x(), p.get_x() + p.get_width(), p.get_alpha()) for p in axis.patches]


def test_a_band_is_the_mean_between_the_lowest_and_the_highest_seed(axis):
    x, values = np.arange(3.0), np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 9.0]])
    axes.draw_band(axis, x, values, color="red", label="some")
    (line,) = axis.lines
    assert line.get_xdata().tolist() == x.tolist()
    assert line.get_ydata().tolist() == [2.0, 3.0, 6.0]
    assert (line.get_color(), line.get_label()) == ("red", "some")
    (band,) = axis.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert corners == {(0, 1), (1, 2), (2, 3), (2, 9), (1, 4), (0, 3)}


def test_one_seed_has_no_band_and_long_lines_are_thinned(axis):
    axes.draw_band(axis, np.arange(10_000.0), np.zeros((1, 10_000)))
    assert not len(axis.collections)
    assert axis.lines[0].get_xdata()[:2].tolist() == [0.0, 5.0]
    assert len(axis.lines[0].get_xdata()) == 2000


def test_the_second_phase_is_shaded_and_a_blend_more_lightly(axis):
    steps = np.arange(1, 7)
    axes.shade_phases(axis, steps, np.array([np.nan, 0.0, 0.5, 0.5, 1.0, 1.0]))
    assert shades(axis) == [(3, 5, pytest.approx(0.15)), (5, 6, pytest.approx(0.3))]


def test_a_long_blend_is_few_bands_without_gaps(axis):
    axes.shade_phases(axis, np.arange(1, 1001), np.linspace(0, 1, 1000))
    found = shades(axis)
    assert 50 < len(found) < 64
    assert found[-1][1] == 1000
    for (_, end, light), (start, _, dark) in itertools.pairwise(found):
        assert end == start
        assert light < dark


def test_no_phase_is_no_shade(axis):
    axes.shade_phases(axis, np.arange(3), np.full(3, np.nan))
    assert not axis.patches


def test_losses_have_a_logarithmic_axis_that_ends_above_the_highest(axis):
    axis.plot([1, 2, 3], [1.0, 2.0, 400.0])
    axes.log_scale(axis, 2.0)
    assert axis.get_yscale() == "log"
    assert axis.get_ylim()[1] == pytest.approx(2.3)


@pytest.mark.parametrize(("low", "high", "ticks"), [(1.0, 4.0, "1.5"), (1.0, 90.0, "50")])
def test_short_axes_of_losses_have_plain_numbers(axis, low, high, ticks):
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axes.plain_ticks(axis)
    axis.figure.draw_without_rendering()
    assert ticks in [label.get_text() for label in axis.get_yticklabels()]


def test_every_config_has_a_style_of_its_own():
    styles = [axes.style_of(i) for i in range(24)]
    assert len(set(styles)) == 24
    assert axes.style_of(24) == styles[0]


def test_the_legend_below_has_the_lines_of_the_axis(axis):
    for name in ("one", "two"):
        axis.plot([0, 1], [0, 1], label=name)
    axes.add_title_and_legend(axis.figure, axis, "the title")
    (legend,) = axis.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    assert axis.figure.get_suptitle() == "the title"


def test_a_png_has_the_figures_own_size():
    image = imread(io.BytesIO(axes.to_png(Figure(figsize=(2, 1), dpi=50))))
    assert image.shape[:2] == (50, 100)
