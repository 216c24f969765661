"""What ``optalr theory`` draws and writes, from spectra that are made up here."""

import csv

import numpy as np
import pytest

from optalr.experiments.reports.axes import to_png
from optalr.experiments.reports.findings import (
    draw_factors,
    draw_noise,
    noise_rows,
    write_findings,
)
from optalr.experiments.studies.theory import GRADIENT, ISOTROPIC, Theory
from optalr.reading.geometry import NoiseSpectrum


def spectrum(*eigenvalues):
    values = np.array(eigenvalues)
    return NoiseSpectrum(values, 0.0, float(values.sum() ** 2 / np.sum(values**2)))


FOUND = Theory(
    noise={GRADIENT: spectrum(8.0, 2.0, 2.0), ISOTROPIC: spectrum(1.5, 1.0, 0.5)},
    spectra=[
        (1, {"a": (np.array([1.0, 4.0]), np.array([2.0])), "b": (np.ones(3), np.ones(2))}),
        (5, {"a": (np.array([0.0, 9.0]), np.array([3.0])), "b": (np.ones(3), np.ones(2))}),
    ],
    num_weights=8,
)


def test_noise_has_a_line_a_direction_over_its_mean():
    (axis,) = draw_noise(FOUND.noise).axes
    gradient, isotropic = axis.lines
    assert gradient.get_xdata().tolist() == [1, 2, 3]
    assert gradient.get_ydata().tolist() == [2.0, 0.5, 0.5]
    assert isotropic.get_ydata().tolist() == [1.5, 1.0, 0.5]
    assert (isotropic.get_linestyle(), isotropic.get_color()) == ("--", "gray")
    assert axis.get_yscale() == "log"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("index", "eigenvalue / mean eigenvalue")
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == [GRADIENT, ISOTROPIC]


def test_factors_have_an_axis_a_side_and_a_line_an_epoch():
    axes = draw_factors(FOUND.spectra).axes
    assert [axis.get_title() for axis in axes] == [
        "a\ninputs (rows)",
        "b\ninputs (rows)",
        "a\noutputs (cols)",
        "b\noutputs (cols)",
    ]
    assert {axis.get_yscale() for axis in axes} == {"log"}
    first, last = axes[0].lines
    assert first.get_xdata().tolist() == [0.0, 1.0]
    assert first.get_ydata().tolist() == [4.0, 1.0]
    # What float32 cannot hold is drawn at its limit.
    assert last.get_ydata() == pytest.approx([9.0, 9e-8])
    # From blue to red over training.
    assert first.get_color()[0] < last.get_color()[0]
    names = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert names == ["epoch 1", "epoch 5"]


def test_rows_have_rank_spread_and_share():
    assert noise_rows(FOUND.noise)[0] == (GRADIENT, "2.0", "4", "66.7%")


def test_the_files_are_the_figures_and_every_eigenvalue(tmp_path):
    files = write_findings(FOUND, tmp_path / "out")
    assert [path.name for path in files] == [
        "noise.csv",
        "factors.csv",
        "noise.png",
        "factors.png",
    ]
    assert files[2].read_bytes() == to_png(draw_noise(FOUND.noise))
    assert files[3].read_bytes() == to_png(draw_factors(FOUND.spectra))
    with open(files[0], newline="") as file:
        noise = list(csv.DictReader(file))
    assert [row["eigenvalue"] for row in noise] == ["8.0", "2.0", "2.0", "1.5", "1.0", "0.5"]
    assert noise[3] == {"direction": ISOTROPIC, "index": "0", "eigenvalue": "1.5"}
    with open(files[1], newline="") as file:
        factors = list(csv.DictReader(file))
    assert len(factors) == 2 * (2 + 1 + 3 + 2)
    assert factors[1] == {
        "epoch": "1",
        "kernel": "a",
        "side": "rows",
        "index": "1",
        "eigenvalue": "4.0",
    }
