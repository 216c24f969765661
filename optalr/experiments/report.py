"""A comparison as a table, a picture, CSV, and one HTML file that needs no other."""

import base64
import csv
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from optalr.experiments import compare
from optalr.experiments.compare import Comparison, Curves
from optalr.experiments.plots import shade_phases
from optalr.experiments.record import write_atomically

_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
# With more configs than colors, the colors come again with other dashes.
_DASHES = ("-", "--", ":")


def write_report(comparison: Comparison) -> tuple[str, Sequence[str], list[Sequence[str]]]:
    """Write ``report.html``, ``curves.png``, ``table.csv`` and ``runs.csv`` into the folder.

    Returns:
      Title, header and rows of the table, for the terminal.
    """
    rows, target = compare.summarize(comparison)
    score = compare.score_name(comparison)
    header, lines = _table(rows, target, score)
    picture = _draw(comparison, score, target)
    write_atomically(comparison.path / "curves.png", picture)
    write_atomically(comparison.path / "table.csv", _summary_csv(rows))
    write_atomically(comparison.path / "runs.csv", _runs_csv(comparison))
    page = _page(comparison, header, lines, target, picture)
    write_atomically(comparison.path / "report.html", page)
    return _title(comparison), header, lines


def _title(comparison: Comparison) -> str:
    config = next(iter(comparison.configs.values()))
    seeds = len(comparison.seeds)
    return (
        f"{config.data.name}, {config.model.name}, {config.train.epochs} epochs, "
        f"batch {config.train.batch_size}: mean ± standard deviation over {seeds} "
        f"seed{'s' if seeds > 1 else ''}"
    )


def _table(
    rows: list[dict[str, Any]], target: float, score: str
) -> tuple[Sequence[str], list[Sequence[str]]]:
    header = (
        "config",
        "train loss",
        "test loss",
        f"test {score.replace('_', ' ')}",
        "lowest test loss",
        f"steps to {target:.3g}",
        f"seconds to {target:.3g}",
        "seconds",
    )
    lines: list[Sequence[str]] = []
    for row in rows:
        name = row["config"]
        if row["diverged"]:
            name += f" ({row['diverged']} of {row['runs']} diverged)"
        finished = row["runs"] - row["diverged"]
        partly = f" ({row['reached']}/{finished})" if row["reached"] < finished else ""
        lines.append(
            (
                name,
                _plus_minus(row["train_loss"]),
                _plus_minus(row["test_loss"]),
                _plus_minus(row[f"test_{score}"]),
                _plus_minus(row["lowest_test_loss"]),
                _plus_minus(row["steps_to_target"], "never") + partly * bool(row["reached"]),
                _seconds(row["seconds_to_target"], "never"),
                _seconds(row["seconds"]),
            )
        )
    return header, lines


def _plus_minus(pair: tuple[float, float], missing: str = "-") -> str:
    mean, deviation = pair
    if math.isnan(mean):
        return missing
    # Two digits of the deviation tell how many digits of the mean mean anything.
    scale = deviation if deviation > 0 else abs(mean) * 1e-2
    digits = min(6, max(0, 1 - math.floor(math.log10(scale)))) if scale > 0 else 0
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _seconds(pair: tuple[float, float], missing: str = "-") -> str:
    mean, deviation = pair
    digits = 2 if mean < 100 else 0
    return missing if math.isnan(mean) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _draw(comparison: Comparison, score: str, target: float) -> bytes:
    figure = Figure(figsize=(13, 14), layout="constrained")
    axes = figure.subplots(4, 2)
    labels = (
        ("step", "training loss"),
        ("seconds of training", "training loss"),
        ("step", "test loss"),
        ("seconds of training", "test loss"),
        ("step", f"test {score.replace('_', ' ')}"),
        ("seconds of training", f"test {score.replace('_', ' ')}"),
        ("step", "learning rate"),
        ("step", "phase"),
    )
    for axis, (x, y) in zip(axes.flat, labels, strict=True):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.3)
    for axis in (*axes[0], *axes[1], axes[3, 0]):
        axis.set_yscale("log")
    for axis in axes[0]:
        axis.axhline(target, color="black", lw=0.8, ls=":")
    for i, name in enumerate(comparison.configs):
        curves = compare.read_curves(comparison, name)
        if curves is not None:
            style = _DASHES[i // len(_COLORS) % len(_DASHES)]
            _draw_config(axes, curves, score, name, (_COLORS[i % len(_COLORS)], style))
    axes[3, 1].set_ylim(-0.05, 1.05)
    axes[0, 0].legend(fontsize="small", ncols=1 + len(comparison.configs) // 9)
    figure.suptitle(_title(comparison))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _draw_config(axes: Any, curves: Curves, score: str, name: str, style: tuple[str, str]) -> None:
    losses = curves.measured["loss"]
    for i, (at, evaluated_at) in enumerate(
        ((curves.steps, curves.evaluation_steps), (curves.seconds, curves.evaluation_seconds))
    ):
        _band(axes[0, i], at, losses, style, name)
        _band(axes[1, i], evaluated_at, curves.evaluated["test_loss"], style, name)
        _band(axes[2, i], evaluated_at, curves.evaluated[f"test_{score}"], style, name)
    for axis, key in ((axes[3, 0], "learning_rate"), (axes[3, 1], "phase")):
        if key in curves.measured:
            _band(axis, curves.steps, curves.measured[key], style, name)
    if "phase" in curves.measured:
        for axis in axes[:3, 0]:
            shade_phases(axis, curves.steps, curves.measured["phase"].mean(axis=0))


def _band(axis: Any, x: np.ndarray, values: np.ndarray, style: tuple[str, str], label: str) -> None:
    """Draw mean and range over seeds; long curves are thinned to what a picture can show."""
    stride = max(1, len(x) // 2000)
    x, values = x[::stride], values[:, ::stride]
    color, dashes = style
    axis.plot(x, values.mean(axis=0), color=color, ls=dashes, lw=1.4, label=label)
    if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def _summary_csv(rows: list[dict[str, Any]]) -> str:
    flat = []
    for row in rows:
        entry: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, tuple):
                entry[f"{key}_mean"], entry[f"{key}_std"] = value
            else:
                entry[key] = value
        flat.append(entry)
    return _csv(flat)


def _runs_csv(comparison: Comparison) -> str:
    rows = []
    for name in comparison.configs:
        for folder in comparison.runs(name):
            seed = folder.config().train.seed
            rows.append({"config": name, "seed": seed, **(folder.result() or {})})
    return _csv(rows)


def _csv(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem;
  color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
table { font-size: 13px; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .5rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
img { max-width: 100%; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
"""


def _page(
    comparison: Comparison,
    header: Sequence[str],
    lines: list[Sequence[str]],
    target: float,
    picture: bytes,
) -> str:
    names, matrix = compare.reaching_matrix(comparison)
    reach = [
        (name, *("-" if math.isnan(step) else f"{step:.0f}" for step in row))
        for name, row in zip(names, matrix, strict=True)
    ]
    image = base64.b64encode(picture).decode()
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(_title(comparison))}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(_title(comparison))}</h1>",
        _html_table(header, lines),
        f"<p>Final losses are over whole splits. Steps and seconds to {target:.3g} are those after "
        f"which the mean of the last {compare.WINDOW} minibatch losses is there, as the curves "
        "show it (where a step is an epoch, the loss itself); seconds are of training alone, "
        "without compilation and evaluation. (k/n): reached by k of n seeds.</p>",
        f"<img alt='curves' src='data:image/png;base64,{image}'>",
        "<p>Lines are means over seeds, bands reach from the lowest to the highest seed; shaded: "
        "the second phase.</p>",
        "<h2>Steps until the final training loss of another config is reached</h2>",
        _html_table(("this config reaches that of", *names), reach),
        "<h2>Configs</h2>",
        *(_config_section(comparison.path, name) for name in comparison.configs),
        "<h2>Environment</h2>",
        f"<pre>{html.escape(_environment(comparison))}</pre></body></html>",
    ]
    return "\n".join(parts)


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _config_section(path: Path, name: str) -> str:
    text = (path / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    summary = f"<summary>{html.escape(name)}</summary>"
    return f"<details>{summary}<pre>{html.escape(text)}</pre></details>"


def _environment(comparison: Comparison) -> str:
    for name in comparison.configs:
        for folder in comparison.runs(name):
            found = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
            return json.dumps(found, indent=2)
    return ""
