"""Pictures of a comparison: everything over steps and seconds, losses and rates over epochs."""

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from optalr.experiments.reports.plots import shade_phases, trailing_mean
from optalr.experiments.studies import compare
from optalr.experiments.studies.compare import Comparison, Curves

_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
# With more configs than colors, the colors come again with other dashes.
_DASHES = ("-", "--", ":")
_DOTS_PER_INCH = 110

_Style = tuple[str, str]


def draw_curves(comparison: Comparison, title: str, score: str, target: float) -> bytes:
    """Return a PNG of losses, score, learning rate and phase, over steps and seconds."""
    figure = Figure(figsize=(13, 14), layout="constrained")
    axes = figure.subplots(4, 2)
    labels = (
        ("step", "training loss"),
        ("seconds of training", "training loss"),
        ("step", "test loss"),
        ("seconds of training", "test loss"),
        ("step", f"test {score}".replace("_", " ")),
        ("seconds of training", f"test {score}".replace("_", " ")),
        ("step", "learning rate"),
        ("step", "phase"),
    )
    for axis, (x, y) in zip(axes.flat, labels, strict=True):
        _label(axis, x, y)
    highest = 0.0
    for name, style, curves in _read(comparison):
        _draw_config(axes, curves, score, name, style)
        highest = max(highest, _highest(curves.evaluated["test_loss"][:, 1:]))
    for axis in axes[0]:
        axis.axhline(target, color="black", lw=0.8, ls=":")
        _log_scale(axis)
    for axis in axes[1]:
        _log_scale(axis, highest)
    axes[3, 0].set_yscale("log")
    axes[3, 1].set_ylim(-0.05, 1.05)
    return _finish(figure, axes[0, 0], title)


def draw_losses(comparison: Comparison, title: str) -> bytes:
    """Return a PNG of the training loss, a mean of each epoch, and the test loss, over epochs."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    _label(axes[0], "epoch", "training loss (mean of an epoch)")
    _label(axes[1], "epoch", "test loss")
    highest = 0.0
    for name, style, curves in _read(comparison, epochs=True):
        ends = _at_epochs(curves)
        tested = ends.evaluated["test_loss"][:, 1:]
        _band(axes[0], ends.steps, ends.measured["loss"], style, name)
        _band(axes[1], ends.evaluation_steps[1:], tested, style, name, marker=".")
        highest = max(highest, _highest(tested))
        if "phase" in curves.measured:
            second = np.flatnonzero(curves.measured["phase"].mean(axis=0) > 0)
            for axis in axes if len(second) else ():
                axis.axvline(second[0] / curves.steps_per_epoch, color=style[0], lw=0.9, ls="--")
    _log_scale(axes[0])
    _log_scale(axes[1], highest)
    return _finish(figure, axes[0], title)


def draw_rates(comparison: Comparison, title: str) -> bytes:
    """Return a small PNG of the training loss and the learning rate, means of ten steps."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    _label(axes[0], "epoch", "training loss")
    _label(axes[1], "epoch", "learning rate")
    for name, style, curves in _read(comparison):
        epochs = curves.steps / curves.steps_per_epoch
        _band(axes[0], epochs, curves.measured["loss"], style, name)
        if "learning_rate" in curves.measured:
            rates = _smooth_rates(curves.measured["learning_rate"], curves.window)
            _band(axes[1], epochs, rates, style, name)
    for axis in axes:
        axis.set_yscale("log")
        low, high = axis.dataLim.intervaly
        if 0 < low <= high < 2 * low:  # one constant rate has no range of its own
            axis.set_ylim(low / 2, 2 * high)
    return _finish(figure, axes[0], title, dots=80)


def _smooth_rates(rates: np.ndarray, window: int) -> np.ndarray:
    """Return trailing geometric means; a rate of zero, a step that was refused, does not count."""
    logs = np.log(np.where(rates > 0, rates, np.nan))
    known = [trailing_mean(np.where(np.isnan(row), 0.0, 1.0), window) for row in logs]
    sums = [trailing_mean(np.nan_to_num(row), window) for row in logs]
    with np.errstate(invalid="ignore"):
        return np.exp(np.stack(sums) / np.stack(known))


def draw_selection(comparison: Comparison) -> bytes:
    """Return a PNG of the losses over steps and seconds; of the test loss if it has a curve.

    Where the configs' epochs have different numbers of steps, as with full batches beside
    mini-batches, it is over epochs instead of steps, and training losses are means of an epoch.
    Where some configs take many more steps than others, as a cheap method given equal time does,
    the steps' axis is logarithmic.
    """
    found = list(_read(comparison))
    over = "step"
    if len({curves.steps_per_epoch for _, _, curves in found}) > 1:
        over = "epoch"
        averaged = _read(comparison, epochs=True)
        found = [(name, style, _at_epochs(curves)) for name, style, curves in averaged]
    tested = any(len(curves.evaluation_steps) > 2 for _, _, curves in found)
    labels = ("training loss", "test loss") if tested else ("training loss",)
    figure = Figure(figsize=(7.8, 3.3 if len(labels) == 1 else 6.2), layout="constrained")
    axes = figure.subplots(len(labels), 2, sharex="col", sharey="row", squeeze=False)
    for axis in axes.flat:
        _label(axis, "", "")
        axis.set_yscale("log")
    for name, style, curves in found:
        for i, (at, evaluated_at) in enumerate(_places(curves)):
            _band(axes[0, i], at, curves.measured["loss"], style, name)
            if tested:
                _band(axes[1, i], evaluated_at, curves.evaluated["test_loss"], style, name)
    start = max((float(c.measured["loss"][:, 0].mean()) for _, _, c in found), default=1.0)
    # An untrained net's test loss is far above all others where its running statistics are none.
    tested_from = max((_highest(c.evaluated["test_loss"][:, 1:]) for _, _, c in found), default=0.0)
    for axis, label, top in zip(axes[:, 0], labels, (np.inf, 1.15 * tested_from), strict=False):
        axis.set_ylabel(label)
        # Above is a breakdown, below a fit to the last bit; both would flatten the rest.
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 1e-6 * start), min(high, 30 * start, top))
        _plain_ticks(axis)
    lengths = [curves.steps[-1] for _, _, curves in found]
    if lengths and max(lengths) > 3 * min(lengths):
        axes[0, 0].set_xscale("log", nonpositive="mask")
    axes[-1, 0].set_xlabel(over)
    axes[-1, 1].set_xlabel("seconds of training")
    return _finish(figure, axes[0, 0], "")


def _read(comparison: Comparison, epochs: bool = False) -> Iterator[tuple[str, _Style, Curves]]:
    for i, name in enumerate(comparison.configs):
        curves = compare.read_curves(comparison, name, epochs=epochs)
        if curves is not None:
            yield name, (_COLORS[i % len(_COLORS)], _DASHES[i // len(_COLORS) % 3]), curves


def _at_epochs(curves: Curves) -> Curves:
    """Return the curves at the ends of epochs only, with epochs in place of steps."""
    length = curves.steps_per_epoch
    ends = slice(length - 1, None, length)
    return dataclasses.replace(
        curves,
        steps=curves.steps[ends] / length,
        seconds=curves.seconds[ends],
        measured={name: values[:, ends] for name, values in curves.measured.items()},
        steps_per_epoch=1,
        evaluation_steps=curves.evaluation_steps / length,
    )


def _draw_config(axes: Any, curves: Curves, score: str, name: str, style: _Style) -> None:
    losses = curves.measured["loss"]
    for i, (at, evaluated_at) in enumerate(_places(curves)):
        _band(axes[0, i], at, losses, style, name)
        _band(axes[1, i], evaluated_at, curves.evaluated["test_loss"], style, name)
        _band(axes[2, i], evaluated_at, curves.evaluated[f"test_{score}"], style, name)
    for axis, key in ((axes[3, 0], "learning_rate"), (axes[3, 1], "phase")):
        if key in curves.measured:
            _band(axis, curves.steps, curves.measured[key], style, name)
    if "phase" in curves.measured:
        for axis in axes[:3, 0]:
            shade_phases(axis, curves.steps, curves.measured["phase"].mean(axis=0))


def _places(curves: Curves) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Return where steps and evaluations lie, in steps and in seconds."""
    return (
        (curves.steps, curves.evaluation_steps),
        (curves.seconds, curves.evaluation_seconds),
    )


def _band(
    axis: Any, x: np.ndarray, values: np.ndarray, style: _Style, label: str, marker: str = ""
) -> None:
    """Draw mean and range over seeds; long curves are thinned to what a picture can show."""
    stride = max(1, len(x) // 2000)
    x, values = x[::stride], values[:, ::stride]
    color, dashes = style
    axis.plot(x, values.mean(axis=0), color=color, ls=dashes, lw=1.4, label=label, marker=marker)
    if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def _highest(values: np.ndarray) -> float:
    """Return the highest mean over seeds; one seed that goes astray should not shrink the rest."""
    return float(values.mean(axis=0).max(initial=0.0))


def _log_scale(axis: Any, highest: float = 0.0) -> None:
    """Make the losses' axis logarithmic, with plain numbers, and end it above ``highest``."""
    axis.set_yscale("log")
    if highest > 0:
        axis.set_ylim(top=1.15 * highest)
    _plain_ticks(axis)


def _plain_ticks(axis: Any) -> None:
    """Write the losses as plain numbers where the axis spans little."""
    low, high = axis.get_ylim()
    if high < 300 * low:
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 8 * low else (1, 2, 5)
        axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)


def _finish(figure: Figure, axis: Any, title: str, dots: int = _DOTS_PER_INCH) -> bytes:
    handles, names = axis.get_legend_handles_labels()
    figure.suptitle(title, fontsize="medium")
    if names:
        columns = max(1, int(12 * figure.get_figwidth()) // (8 + max(map(len, names))))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dots, format="png")
    return buffer.getvalue()
