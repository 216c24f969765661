"""The picture of a run: loss, score, learning rate and phase over steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from optalr.experiments.records.run_folder import EVALUATIONS, METRICS, RunFolder
from optalr.experiments.records.writing import write_atomically
from optalr.experiments.reports.axes import shade_phases, to_png
from optalr.experiments.studies.curves import WINDOW
from optalr.experiments.studies.series import column, trailing_mean

_SPLITS = (("validation", "tab:orange"), ("test", "tab:red"))
_DOTS_PER_INCH = 110


def plot_run(folder: RunFolder, score_name: str) -> Path:
    """Draw ``curves.png`` into a run folder and return its path."""
    path = folder.path / "curves.png"
    write_atomically(path, to_png(draw_run(folder, score_name)))
    return path


def draw_run(folder: RunFolder, score_name: str) -> Figure:
    """Draw loss, score, learning rate and phase of a run over its steps.

    Args:
      folder: the run, finished or not.
      score_name: the score's name in the run's metrics.
    """
    rows, evaluations = folder.rows(METRICS), folder.rows(EVALUATIONS)
    config = folder.config()
    figure = Figure(figsize=(10, 7), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    steps, rates, phases = (column(rows, name) for name in ("step", "learning_rate", "phase"))
    _draw_curve(axes[0, 0], rows, evaluations, name="loss")
    axes[0, 0].set_yscale("log")
    _draw_curve(axes[0, 1], rows, evaluations, name=score_name)
    for axis, values, label in (
        (axes[1, 0], rates, "learning rate"),
        (axes[1, 1], phases, "phase"),
    ):
        axis.plot(steps, values, color="tab:blue")
        axis.set_ylabel(label)
        axis.set_xlabel("step")
    # A rate that is unknown or zero throughout has no logarithm to show.
    if np.any(rates > 0):
        axes[1, 0].set_yscale("log")
    axes[1, 1].set_ylim(-0.05, 1.05)
    if not np.isfinite(phases).any():
        axes[1, 1].text(
            0.5, 0.5, "this method has no phases", transform=axes[1, 1].transAxes, ha="center"
        )
    for axis in axes.flat:
        shade_phases(axis, steps, phases)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{config.method.name} on {config.data.name} ({config.model.name})")
    return figure


def _draw_curve(
    axis: Any, rows: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], *, name: str
) -> None:
    """Draw a measure of every minibatch, its trailing mean, and what evaluations found."""
    steps, values = column(rows, "step"), column(rows, name)
    axis.plot(steps, values, color="tab:blue", alpha=0.25, lw=0.8)
    # Over as many steps as in a comparison, so that both show one curve.
    label = f"train (mean of {WINDOW})"
    axis.plot(steps, trailing_mean(values, WINDOW), color="tab:blue", label=label)
    for split, color in _SPLITS:
        measured = column(evaluations, f"{split}_{name}")
        if np.isfinite(measured).any():
            at = column(evaluations, "step")
            axis.plot(at, measured, color=color, marker=".", ms=4, label=split)
    axis.set_ylabel(name.replace("_", " "))
    axis.legend(fontsize="small")
