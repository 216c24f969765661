"""What ``optalr theory`` found, as a table, CSV files and pictures."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from optalr.experiments.studies.theory import ISOTROPIC, Factors, Theory
from optalr.reading.geometry import NoiseSpectrum

_DOTS_PER_INCH = 100


def noise_rows(noise: dict[str, NoiseSpectrum]) -> list[tuple[str, ...]]:
    """Return one row of text per direction: effective rank, spread, share of the largest tenth."""
    rows = []
    for name, spectrum in noise.items():
        values = spectrum.eigenvalues
        tenth = values[: max(1, len(values) // 10)].sum() / values.sum()
        spread = values[0] / np.median(values)
        rows.append((name, f"{spectrum.effective_rank:.1f}", f"{spread:.3g}", f"{tenth:.1%}"))
    return rows


def write_findings(theory: Theory, path: Path) -> list[Path]:
    """Write two CSV files and two pictures into a new or existing folder; return their paths."""
    path.mkdir(parents=True, exist_ok=True)
    noise = (
        (name, i, value)
        for name, spectrum in theory.noise.items()
        for i, value in enumerate(spectrum.eigenvalues)
    )
    factors = (
        (epoch, kernel, side, i, value)
        for epoch, spectra in theory.spectra
        for kernel, sides in spectra.items()
        for side, values in zip(("rows", "cols"), sides, strict=True)
        for i, value in enumerate(values.reshape(-1))
    )
    files = [path / name for name in ("noise.csv", "factors.csv", "noise.png", "factors.png")]
    _write_csv(files[0], ("direction", "index", "eigenvalue"), noise)
    _write_csv(files[1], ("epoch", "kernel", "side", "index", "eigenvalue"), factors)
    draw_noise(theory.noise).savefig(files[2], dpi="figure")
    draw_factors(theory.spectra).savefig(files[3], dpi="figure")
    return files


def draw_noise(noise: dict[str, NoiseSpectrum]) -> Figure:
    """Draw the eigenvalues of every direction's covariance, divided by their mean."""
    figure = Figure(figsize=(7, 4.5), dpi=_DOTS_PER_INCH, layout="constrained")
    axis = figure.subplots()
    for name, spectrum in noise.items():
        values = spectrum.eigenvalues / spectrum.eigenvalues.mean()
        style = {"color": "gray", "ls": "--"} if name == ISOTROPIC else {}
        axis.semilogy(np.arange(1, len(values) + 1), values, label=name, **style)
    axis.set(xlabel="index", ylabel="eigenvalue / mean eigenvalue")
    axis.set_title("Covariance of directions over minibatches")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def draw_factors(spectra: list[tuple[int, Factors]]) -> Figure:
    """Draw the eigenvalues of every kernel's two factors, one line per epoch."""
    kernels = list(spectra[0][1])
    figsize = (2.6 * max(2, len(kernels)), 5.2)
    figure = Figure(figsize=figsize, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(2, len(kernels), squeeze=False)
    # From blue to red over training.
    shades = np.linspace(0.1, 0.85, len(spectra))
    for i, kernel in enumerate(kernels):
        for j, side in enumerate(("inputs (rows)", "outputs (cols)")):
            axis = axes[j, i]
            for shade, (epoch, found) in zip(shades, spectra, strict=True):
                values = np.sort(found[kernel][j].reshape(-1))[::-1]
                # Below this, float32 factors hold nothing but rounding.
                values = np.maximum(values, 1e-8 * values[0])
                color = (shade, 0.25, 1 - shade)
                # Kernels of different sizes share an axis from 0 to 1.
                places = np.linspace(0, 1, len(values))
                axis.semilogy(places, values, color=color, lw=1, label=f"epoch {epoch}")
            axis.set_title(f"{kernel}\n{side}", fontsize=7)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("eigenvalue")
    axes[1, 0].set_ylabel("eigenvalue")
    axes[1, 0].set_xlabel("place (0 largest, 1 smallest)", fontsize=8)
    axes[0, 0].legend(fontsize=6)
    return figure


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
