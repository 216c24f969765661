"""Pictures of a run: loss, score, learning rate and phase over steps."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from optalr.experiments.records.run_folder import EVALUATIONS, METRICS, RunFolder

_SHADE = "#f2c14e"
_SPLITS = (("validation", "tab:orange"), ("test", "tab:red"))


def plot_run(folder: RunFolder, score_name: str) -> Path:
    """Draw ``curves.png`` into a run folder and return its path."""
    rows, evaluations = folder.rows(METRICS), folder.rows(EVALUATIONS)
    config = folder.config()
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    steps = column(rows, "step")
    _curve(axes[0, 0], rows, evaluations, "loss")
    axes[0, 0].set_yscale("log")
    _curve(axes[0, 1], rows, evaluations, score_name)
    for axis, name in ((axes[1, 0], "learning_rate"), (axes[1, 1], "phase")):
        axis.plot(steps, column(rows, name), color="tab:blue")
        axis.set_ylabel(name.replace("_", " "))
        axis.set_xlabel("step")
    rates = column(rows, "learning_rate")
    if np.any(rates > 0):
        axes[1, 0].set_yscale("log")
    axes[1, 1].set_ylim(-0.05, 1.05)
    if not np.isfinite(column(rows, "phase")).any():
        axes[1, 1].text(
            0.5, 0.5, "this method has no phases", transform=axes[1, 1].transAxes, ha="center"
        )
    for axis in axes.flat:
        shade_phases(axis, steps, column(rows, "phase"))
        axis.grid(alpha=0.3)
    figure.suptitle(f"{config.method.name} on {config.data.name} ({config.model.name})")
    path = folder.path / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Return one number of every row, NaN where a row lacks it."""
    return np.array([row.get(name, np.nan) for row in rows], np.float64)


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last ``window`` values at each place, of fewer at the start."""
    if not len(values):
        return values
    window = max(1, min(window, len(values)))
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def shade_phases(axis: Any, steps: np.ndarray, phases: np.ndarray) -> None:
    """Shade the stretches in which the second stage acts, a blend more lightly."""
    phases = np.nan_to_num(phases)
    edges = np.flatnonzero(np.diff(phases)) + 1
    bounds = [0, *edges.tolist(), len(phases)]
    # A long blend has an edge a step; draw it as a few bands.
    if len(bounds) > 64:
        bounds = sorted({bounds[round(i)] for i in np.linspace(0, len(bounds) - 1, 64)})
    for start, stop in itertools.pairwise(bounds):
        if stop > start and phases[start] > 0:
            right = steps[min(stop, len(steps) - 1)]
            axis.axvspan(steps[start], right, color=_SHADE, alpha=0.3 * phases[start], lw=0)


def _curve(axis: Any, rows: list, evaluations: list, name: str) -> None:
    steps, values = column(rows, "step"), column(rows, name)
    axis.plot(steps, values, color="tab:blue", alpha=0.25, lw=0.8)
    axis.plot(steps, trailing_mean(values, 10), color="tab:blue", label="train (mean of 10)")
    for split, color in _SPLITS:
        measured = column(evaluations, f"{split}_{name}")
        if np.isfinite(measured).any():
            at = column(evaluations, "step")
            axis.plot(at, measured, color=color, marker=".", ms=4, label=split)
    axis.set_ylabel(name.replace("_", " "))
    axis.legend(fontsize="small")
