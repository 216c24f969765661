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

from optalr.experiments.records.run_folder import write_atomically
from optalr.experiments.reports.pictures import draw_curves, draw_losses, draw_rates
from optalr.experiments.studies import compare
from optalr.experiments.studies.compare import Comparison


def write_report(comparison: Comparison) -> tuple[str, Sequence[str], list[Sequence[str]]]:
    """Write ``report.html``, three pictures, ``table.csv`` and ``runs.csv`` into the folder.

    ``curves.png`` has everything over steps and seconds, ``losses.png`` the losses over epochs,
    ``rates.png`` the learning rates beside the training loss, small and a little smoothed. Of runs
    that are not finished only the count is told.

    Returns:
      Title, header and rows of the table, for the terminal.
    """
    rows, target = compare.summarize(comparison)
    score = compare.score_name(comparison)
    header, lines = _table(rows, target, score, len(comparison.seeds))
    title = f"{_problem(comparison)}: mean and range over seeds"
    picture = draw_curves(comparison, title, score, target)
    write_atomically(comparison.path / "curves.png", picture)
    write_atomically(comparison.path / "losses.png", draw_losses(comparison, title))
    write_atomically(comparison.path / "rates.png", draw_rates(comparison, title))
    write_atomically(comparison.path / "table.csv", _summary_csv(rows))
    write_atomically(comparison.path / "runs.csv", _runs_csv(comparison))
    page = _page(comparison, header, lines, target, picture)
    write_atomically(comparison.path / "report.html", page)
    return _title(comparison), header, lines


def _title(comparison: Comparison) -> str:
    seeds = len(comparison.seeds)
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return f"{_problem(comparison)}: {over}"


def _problem(comparison: Comparison) -> str:
    config = next(iter(comparison.configs.values()))
    return (
        f"{config.data.name}, {config.model.name}, {config.train.epochs} epochs, "
        f"batch {config.train.batch_size}"
    )


def _table(
    rows: list[dict[str, Any]], target: float, score: str, num_seeds: int
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
        if row["runs"] < num_seeds:
            name += f" ({row['runs']} of {num_seeds} seeds)"
        if row["diverged"]:
            name += f" ({row['diverged']} of {row['runs']} diverged)"
        finished = row["runs"] - row["diverged"]
        never = "never" if finished else "-"
        partly = f" ({row['reached']}/{finished})" if row["reached"] < finished else ""
        lines.append(
            (
                name,
                _plus_minus(row["train_loss"]),
                _plus_minus(row["test_loss"]),
                _plus_minus(row[f"test_{score}"]),
                _plus_minus(row["lowest_test_loss"]),
                _plus_minus(row["steps_to_target"], never) + partly * bool(row["reached"]),
                _seconds(row["seconds_to_target"], never),
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
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def _seconds(pair: tuple[float, float], missing: str = "-") -> str:
    mean, deviation = pair
    digits = 2 if mean < 100 else 0
    if math.isnan(mean):
        return missing
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


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
:root { color-scheme: light dark; --line: #ccc; --code: #f4f4f4; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --code: #262626; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
img { max-width: 100%; background: white; }
pre { background: var(--code); padding: .8rem; overflow-x: auto; }
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
        "<p>Lines are means over seeds, bands reach from the lowest to the highest seed; the test "
        "loss is cut off above the highest mean after the first evaluation. Shaded: the second "
        f"phase; dotted: the training loss {target:.3g}.</p>",
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
