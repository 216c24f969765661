"""Pictures of the bench: performance profiles, and curves of the test loss."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from optalr.experiments.reports.axes import plain_ticks

from .curves import STEP, TEST
from .gathering import REFERENCE, Bench
from .profiles import all_costs, profile


class Look(NamedTuple):
    """How a method is drawn.

    Attributes:
      color: of its line.
      dashes: a line style of matplotlib's.
      width: of its line.
    """

    color: str
    dashes: str = "-"
    width: float = 1.6


# The colors are those of Okabe and Ito, which stay apart for the color-blind. Tuned methods have
# solid lines; black and the widest is the recipe.
_RECIPE = Look("#000000", "-", 2.6)
_LOOKS = {
    "adam": Look("#0072B2"),
    "adamw": Look("#D55E00"),
    "sgd": Look("#8C8C8C"),
    "adam_learned_decay": Look("#009E73", "--"),
    "adam_1e-3": Look("#56B4E9", "--"),
    "adam_3e-3": Look("#56B4E9", ":"),
    "schedule_free": Look("#CC79A7", "--"),
    "prodigy": Look("#CC79A7", ":"),
    "muon": Look("#E69F00", "--"),
    "soap": Look("#E69F00", ":"),
}
_OTHER = Look("#8C8C8C", "-.")
# What the curves show beside the recipe.
_CURVES = ("adam", "adamw", "adam_learned_decay")
# How far right the profiles go: steps and seconds, test losses.
_FACTORS = {"steps": 8.0, "seconds": 8.0, "test loss": 1.5}
_TITLES = {
    "steps": "Steps until Adam's best validation loss",
    "seconds": "Seconds until Adam's best validation loss",
    "test loss": "Final test loss",
}


def look_of(method: str, recipe: str) -> Look:
    """Return how a method looks, the same in every picture."""
    return _RECIPE if method == recipe else _LOOKS.get(method, _OTHER)


def label_of(bench: Bench, method: str) -> str:
    """Return a method's name for people."""
    return method.replace("_", " ") + (", tuned" if bench.methods[method].tuned else "")


def apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """Move heights of labels so that they are at least ``gap`` apart, and stay between 0 and 1.

    Labels that would touch form a group around the mean of their heights.

    Args:
      heights: in rising order.
      gap: room for one label.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _overlap(groups[-2], groups[-1], gap):
            last = groups.pop()
            groups[-1] += last
    return np.concatenate([_spread(group, gap) for group in groups])


def _spread(group: list[float], gap: float) -> np.ndarray:
    half = gap * (len(group) - 1) / 2
    # A group that is higher than the picture starts at the bottom.
    center = max(min(float(np.mean(group)), 1 - half), half)
    return np.linspace(center - half, center + half, len(group))


def _overlap(below: list[float], above: list[float], gap: float) -> bool:
    return _spread(above, gap)[0] - _spread(below, gap)[-1] < gap * (1 - 1e-9)


def draw_profiles(bench: Bench, recipe: str) -> Figure:
    """Draw three performance profiles side by side, each line with its name at its end."""
    figure = Figure(figsize=(13.5, 4.6), dpi=110, layout="constrained")
    found = all_costs(bench, recipe)
    for axis, (name, costs) in zip(figure.subplots(1, 3), found.items(), strict=True):
        factors = np.geomspace(1, _FACTORS[name], 600)
        shares = profile(costs.values, factors)
        # Of lines that end together the one that was higher on the way is named higher.
        order = np.lexsort((shares.mean(axis=1), shares[:, -1]))
        heights = apart(shares[order, -1], 0.055)
        for at, height in zip(order, heights, strict=True):
            method = costs.methods[at]
            look = look_of(method, recipe)
            style = {"color": look.color, "lw": look.width, "zorder": 3 if look is _RECIPE else 2}
            style["drawstyle"] = "steps-post"
            axis.plot(factors, shares[at], look.dashes, **style)
            _name_line(axis, label_of(bench, method), look, heights=(shares[at, -1], height))
        axis.set_title(_TITLES[name], fontsize="medium")
        _factor_axis(axis, _FACTORS[name])
        axis.set_ylim(-0.02, 1.02)
    figure.axes[0].set_ylabel("share of problems and seeds")
    number = len(next(iter(found.values())).problems)
    figure.suptitle(
        f"How often a method is within a factor of the best "
        f"({number} of {len(bench.roles)} problems; higher is better)"
    )
    return figure


def _name_line(axis: Any, name: str, look: Look, *, heights: tuple[float, float]) -> None:
    """Write a line's name right of the axis; ``heights`` are those of its end and of its name."""
    across = axis.get_yaxis_transform()
    leader = {"color": look.color, "lw": 0.7, "transform": across, "clip_on": False}
    axis.plot((1.0, 1.05), heights, **leader)
    weight = "bold" if look is _RECIPE else "normal"
    style = {"color": look.color, "va": "center", "fontsize": 8.5, "weight": weight}
    axis.text(1.06, heights[1], name, transform=across, **style)


def _factor_axis(axis: Any, highest: float) -> None:
    axis.set_xscale("log")
    axis.set_xlim(1, highest)
    ticks = (1, 2, 4, 8) if highest > 2 else (1, 1.1, 1.2, 1.3, 1.5)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.set_xlabel("factor of the best")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_curves(bench: Bench, recipe: str) -> Figure:
    """Draw the test loss over the steps, a small picture for each problem."""
    figure = Figure(figsize=(13.5, 5.8), dpi=110, layout="constrained")
    names = [name for name in dict.fromkeys((*_CURVES, recipe)) if name in bench.methods]
    axes = figure.subplots(2, 5)
    problems = sorted(bench.roles, key=lambda problem: bench.roles[problem])
    for axis, problem in zip(axes.flat, problems, strict=True):
        for name in names:
            _draw_curve(axis, bench, (problem, name), look=look_of(name, recipe))
        _finish_curves(axis, problem.replace("_", " "))
    for row in (0, 1):
        axes[row, 0].set_ylabel(f"{bench.roles[problems[5 * row]]}: test loss", fontsize=9.5)
    handles = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    place = {"loc": "outside lower center", "ncols": len(handles) or 1, "frameon": False}
    figure.legend(handles.values(), handles.keys(), labelcolor="linecolor", fontsize=10, **place)
    figure.suptitle(
        "Test loss over the steps: mean over the seeds; "
        "bands: standard error of the difference from tuned Adam",
        fontsize=11,
    )
    return figure


def _draw_curve(axis: Any, bench: Bench, place: tuple[str, str], *, look: Look) -> None:
    problem, method = place
    runs = {seed: run for seed, run in bench.of(problem, method).items() if run.ended}
    if not runs:
        return
    steps = next(iter(runs.values())).curve[:, STEP]
    mean = np.mean([run.losses(TEST) for run in runs.values()], axis=0)
    style = {"color": look.color, "lw": look.width, "label": label_of(bench, method)}
    axis.plot(steps, mean, look.dashes, **style)
    # Seeds split the data of some problems, so their losses differ far more than methods do. What
    # tells methods apart is the difference within a seed.
    adams = {seed: run for seed, run in bench.of(problem, REFERENCE).items() if run.ended}
    pairs = [(runs[seed], adams[seed]) for seed in sorted(set(runs) & set(adams))]
    if len(pairs) > 1:
        differences = [ours.losses(TEST) - theirs.losses(TEST) for ours, theirs in pairs]
        error = np.std(differences, axis=0, ddof=1) / np.sqrt(len(pairs))
        axis.fill_between(steps, mean - error, mean + error, color=look.color, alpha=0.15, lw=0)


def _finish_curves(axis: Any, title: str) -> None:
    """Choose what is in view: the first two points are left out, for what matters is the end."""
    axis.set_title(title, fontsize=9.5)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if not axis.lines:
        axis.text(0.5, 0.5, "no runs yet", ha="center", transform=axis.transAxes)
        axis.set_yticks([])
        axis.set_xticks([])
        return
    tails = np.concatenate([np.asarray(line.get_ydata())[2:] for line in axis.lines])
    low, high = tails.min(), tails.max()
    axis.set_xlim(left=0)
    if high > 4 * low > 0:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.15, high * 1.15)
        plain_ticks(axis)
    else:
        room = 0.1 * (high - low)
        axis.set_ylim(low - room, high + room)
        axis.yaxis.set_major_locator(MaxNLocator(5))
