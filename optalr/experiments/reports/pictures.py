"""Pictures of a comparison: everything over steps and seconds, losses and rates over epochs.

Each function returns the figure; ``axes.to_png`` makes a file of it.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from optalr.experiments.reports.axes import (
    Style,
    add_title_and_legend,
    draw_band,
    label_axis,
    log_scale,
    plain_ticks,
    shade_phases,
    style_of,
)
from optalr.experiments.studies.compare import Comparison
from optalr.experiments.studies.curves import Curves, read_curves, score_name
from optalr.experiments.studies.series import trailing_mean

_DOTS_PER_INCH = 110
# For the small picture, which stands between paragraphs.
_FEW_DOTS_PER_INCH = 80


class _Drawn(NamedTuple):
    """One config's curves and how they are drawn."""

    name: str
    style: Style
    curves: Curves

    def band(self, axis: Any, x: np.ndarray, values: np.ndarray, *, marker: str = "") -> None:
        """Draw mean and range over seeds."""
        color, dashes = self.style
        draw_band(axis, x, values, color=color, ls=dashes, label=self.name, marker=marker)


def draw_curves(comparison: Comparison, title: str, *, target: float) -> Figure:
    """Draw losses, score, learning rate and phase, over steps and seconds.

    Args:
      comparison: the runs; those of a config that has none finished are left out.
      title: the figure's title.
      target: the training loss to mark by a dotted line.
    """
    score = score_name(comparison)
    figure = Figure(figsize=(13, 14), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(4, 2)
    test_score = f"test {score}".replace("_", " ")
    for row, y in zip(axes, ("training loss", "test loss", test_score), strict=False):
        label_axis(row[0], "step", y)
        label_axis(row[1], "seconds of training", y)
    label_axis(axes[3, 0], "step", "learning rate")
    label_axis(axes[3, 1], "step", "phase")
    # The test loss before training is drawn, but what comes after it sets the scale.
    highest = 0.0
    for drawn in _read(comparison):
        _draw_config(axes, drawn, score)
        highest = max(highest, _highest(drawn.curves.evaluated["test_loss"][:, 1:]))
    for axis in axes[0]:
        axis.axhline(target, color="black", lw=0.8, ls=":")
        log_scale(axis)
    for axis in axes[1]:
        log_scale(axis, highest)
    axes[3, 0].set_yscale("log")
    axes[3, 1].set_ylim(-0.05, 1.05)
    add_title_and_legend(figure, axes[0, 0], title)
    return figure


def draw_losses(comparison: Comparison, title: str) -> Figure:
    """Draw the training loss, a mean of each epoch, and the test loss, over epochs.

    A dashed line marks the epoch in which a config's second phase begins.
    """
    figure = Figure(figsize=(9, 4.2), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(1, 2)
    label_axis(axes[0], "epoch", "training loss (mean of an epoch)")
    label_axis(axes[1], "epoch", "test loss")
    highest = 0.0
    for drawn in _read(comparison, epochs=True):
        ends = _at_epochs(drawn.curves)
        # From the first epoch on: the loss of the untrained net would set the scale.
        tested = ends.evaluated["test_loss"][:, 1:]
        drawn.band(axes[0], ends.steps, ends.measured["loss"])
        drawn.band(axes[1], ends.evaluation_steps[1:], tested, marker=".")
        highest = max(highest, _highest(tested))
        second = np.flatnonzero(_mean_phase(drawn.curves) > 0)
        if len(second):
            begins = second[0] / drawn.curves.steps_per_epoch
            for axis in axes:
                axis.axvline(begins, color=drawn.style.color, lw=0.9, ls="--")
    log_scale(axes[0])
    log_scale(axes[1], highest)
    add_title_and_legend(figure, axes[0], title)
    return figure


def draw_rates(comparison: Comparison, title: str) -> Figure:
    """Draw a small picture of training loss and learning rate, as trailing means over epochs."""
    figure = Figure(figsize=(10, 4), dpi=_FEW_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(1, 2)
    label_axis(axes[0], "epoch", "training loss")
    label_axis(axes[1], "epoch", "learning rate")
    for drawn in _read(comparison):
        curves = drawn.curves
        epochs = curves.steps / curves.steps_per_epoch
        drawn.band(axes[0], epochs, curves.measured["loss"])
        if "learning_rate" in curves.measured:
            rates = smooth_rates(curves.measured["learning_rate"], curves.window)
            drawn.band(axes[1], epochs, rates)
    for axis in axes:
        axis.set_yscale("log")
        low, high = axis.dataLim.intervaly
        if 0 < low <= high < 2 * low:  # one constant rate has no range of its own
            axis.set_ylim(low / 2, 2 * high)
    add_title_and_legend(figure, axes[0], title)
    return figure


def smooth_rates(rates: np.ndarray, window: int) -> np.ndarray:
    """Return trailing geometric means. A rate of zero, of a refused step, does not count.

    The means are geometric, because rates differ by factors and the axis is logarithmic.
    """
    logs = np.log(np.where(rates > 0, rates, np.nan))
    known = [trailing_mean(np.where(np.isnan(row), 0.0, 1.0), window) for row in logs]
    sums = [trailing_mean(np.nan_to_num(row), window) for row in logs]
    with np.errstate(invalid="ignore"):
        return np.exp(np.stack(sums) / np.stack(known))


def draw_selection(comparison: Comparison) -> Figure:
    """Draw the losses over steps and seconds; the test loss only if it was measured on the way.

    Epochs of full batches have fewer steps than epochs of mini-batches. Where the configs differ in
    this, epochs take the place of steps, and training losses are means of an epoch. Where some
    configs take many more steps than others, as a cheap method does in equal time, the axis of
    steps is logarithmic.
    """
    found, over = list(_read(comparison)), "step"
    if len({drawn.curves.steps_per_epoch for drawn in found}) > 1:
        over = "epoch"
        averaged = _read(comparison, epochs=True)
        found = [drawn._replace(curves=_at_epochs(drawn.curves)) for drawn in averaged]
    tested = any(len(drawn.curves.evaluation_steps) > 2 for drawn in found)
    labels = ("training loss", "test loss") if tested else ("training loss",)
    height = 6.2 if tested else 3.3
    figure = Figure(figsize=(7.8, height), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(len(labels), 2, sharex="col", sharey="row", squeeze=False)
    for axis in axes.flat:
        label_axis(axis, "", "")
        axis.set_yscale("log")
    for drawn in found:
        for i, (at, evaluated_at) in enumerate(_places(drawn.curves)):
            drawn.band(axes[0, i], at, drawn.curves.measured["loss"])
            if tested:
                drawn.band(axes[1, i], evaluated_at, drawn.curves.evaluated["test_loss"])
    for axis, label, limits in zip(axes[:, 0], labels, _loss_limits(found), strict=False):
        axis.set_ylabel(label)
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, limits[0]), min(high, limits[1]))
        plain_ticks(axis)
    lengths = [drawn.curves.steps[-1] for drawn in found]
    if lengths and max(lengths) > 3 * min(lengths):
        # The evaluation before the first step lies at 0, which has no logarithm.
        axes[0, 0].set_xscale("log", nonpositive="mask")
    axes[-1, 0].set_xlabel(over)
    axes[-1, 1].set_xlabel("seconds of training")
    add_title_and_legend(figure, axes[0, 0], "")
    return figure


def _loss_limits(found: Iterable[_Drawn]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits between which training and test losses are worth showing.

    Above is a breakdown, below a fit to the last bit. Both would flatten the rest.
    """
    all_curves = [drawn.curves for drawn in found]
    start = max((float(c.measured["loss"][:, 0].mean()) for c in all_curves), default=1.0)
    # Without the first evaluation: an untrained net whose running statistics are still those of
    # its initialization can have a test loss far above all that follow.
    tested = max((_highest(c.evaluated["test_loss"][:, 1:]) for c in all_curves), default=0.0)
    low, high = 1e-6 * start, 30 * start
    return (low, high), (low, min(high, 1.15 * tested))


def _read(comparison: Comparison, epochs: bool = False) -> Iterator[_Drawn]:
    """Yield the configs with finished runs; a config keeps its style in every picture."""
    for i, name in enumerate(comparison.configs):
        curves = read_curves(comparison, name, epochs=epochs)
        if curves is not None:
            yield _Drawn(name, style_of(i), curves)


def _at_epochs(curves: Curves) -> Curves:
    """Return the curves at the ends of epochs only, with epochs in place of steps."""
    length = curves.steps_per_epoch
    # At the last step of an epoch the trailing mean is over all of its steps.
    ends = slice(length - 1, None, length)
    return dataclasses.replace(
        curves,
        steps=curves.steps[ends] / length,
        seconds=curves.seconds[ends],
        measured={name: values[:, ends] for name, values in curves.measured.items()},
        steps_per_epoch=1,
        evaluation_steps=curves.evaluation_steps / length,
    )


def _draw_config(axes: Any, drawn: _Drawn, score: str) -> None:
    """Draw one config into the eight axes of ``draw_curves``."""
    curves = drawn.curves
    for i, (at, evaluated_at) in enumerate(_places(curves)):
        drawn.band(axes[0, i], at, curves.measured["loss"])
        drawn.band(axes[1, i], evaluated_at, curves.evaluated["test_loss"])
        drawn.band(axes[2, i], evaluated_at, curves.evaluated[f"test_{score}"])
    for axis, key in ((axes[3, 0], "learning_rate"), (axes[3, 1], "phase")):
        if key in curves.measured:
            drawn.band(axis, curves.steps, curves.measured[key])
    for axis in axes[:3, 0]:
        shade_phases(axis, curves.steps, _mean_phase(curves))


def _mean_phase(curves: Curves) -> np.ndarray:
    """Return the mean phase over seeds at each step, 0 for a method without phases."""
    phases = curves.measured.get("phase")
    return np.zeros(len(curves.steps)) if phases is None else phases.mean(axis=0)


def _places(curves: Curves) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Return where steps and evaluations lie, in steps and in seconds."""
    return (
        (curves.steps, curves.evaluation_steps),
        (curves.seconds, curves.evaluation_seconds),
    )


def _highest(values: np.ndarray) -> float:
    """Return the highest mean over seeds, so that one stray seed does not set the scale."""
    return float(values.mean(axis=0).max(initial=0.0))
