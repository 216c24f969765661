"""The report of a comparison: its table, its CSV files, its pictures and its page."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from optalr.experiments.records.writing import write_atomically
from optalr.experiments.reports.axes import to_png
from optalr.experiments.reports.page import TextTable, html_page
from optalr.experiments.reports.pictures import draw_curves, draw_losses, draw_rates
from optalr.experiments.studies.compare import Comparison
from optalr.experiments.studies.curves import score_name, summarize


def write_report(comparison: Comparison) -> TextTable:
    """Write ``report.html``, three pictures, ``table.csv`` and ``runs.csv`` into the folder.

    ``curves.png`` shows everything over steps and seconds, and ``losses.png`` the losses over
    epochs. ``rates.png`` shows the learning rates beside the training loss, small and a little
    smoothed. Runs that are not finished are only counted.

    Returns:
      The table, for the terminal.
    """
    rows, target = summarize(comparison)
    problem = _problem(comparison)
    table = TextTable(
        f"{problem}: {_over(comparison)}",
        _header(target, score_name(comparison)),
        [_line(row, score_name(comparison), len(comparison.seeds)) for row in rows],
    )
    caption = f"{problem}: mean and range over seeds"
    picture = to_png(draw_curves(comparison, caption, target=target))
    files = {
        "curves.png": picture,
        "losses.png": to_png(draw_losses(comparison, caption)),
        "rates.png": to_png(draw_rates(comparison, caption)),
        "table.csv": _summary_csv(rows),
        "runs.csv": _runs_csv(comparison),
        "report.html": html_page(comparison, table, target=target, picture=picture),
    }
    for name, content in files.items():
        write_atomically(comparison.path / name, content)
    return table


def _header(target: float, score: str) -> Sequence[str]:
    return (
        "config",
        "train loss",
        "test loss",
        f"test {score.replace('_', ' ')}",
        "lowest test loss",
        f"steps to {target:.3g}",
        f"seconds to {target:.3g}",
        "seconds",
    )


def _line(row: dict[str, Any], score: str, num_seeds: int) -> Sequence[str]:
    """Return a row of ``curves.summarize`` as text, with counts of missing and diverged runs."""
    name = row["config"]
    if row["runs"] < num_seeds:
        name += f" ({row['runs']} of {num_seeds} seeds)"
    if row["diverged"]:
        name += f" ({row['diverged']} of {row['runs']} diverged)"
    finished = row["runs"] - row["diverged"]
    # A config without a finished run did not fail to get there: nothing is known.
    never = "never" if finished else "-"
    some = row["reached"] and row["reached"] < finished
    return (
        name,
        _plus_minus(row["train_loss"]),
        _plus_minus(row["test_loss"]),
        _plus_minus(row[f"test_{score}"]),
        _plus_minus(row["lowest_test_loss"]),
        _plus_minus(row["steps_to_target"], never)
        + (f" ({row['reached']}/{finished})" if some else ""),
        _seconds(row["seconds_to_target"], never),
        _seconds(row["seconds"]),
    )


def _problem(comparison: Comparison) -> str:
    # The configs share their data. Whether they share the rest is up to the user.
    config = next(iter(comparison.configs.values()))
    return (
        f"{config.data.name}, {config.model.name}, {config.train.epochs} epochs, "
        f"batch {config.train.batch_size}"
    )


def _over(comparison: Comparison) -> str:
    seeds = len(comparison.seeds)
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"


def _plus_minus(pair: tuple[float, float], missing: str = "-") -> str:
    mean, deviation = pair
    if math.isnan(mean):
        return missing
    # Two digits of the deviation show how many digits of the mean mean anything.
    scale = deviation if deviation > 0 else abs(mean) * 1e-2
    digits = min(6, max(0, 1 - math.floor(math.log10(scale)))) if scale > 0 else 0
    return _with_deviation(pair, digits)


def _seconds(pair: tuple[float, float], missing: str = "-") -> str:
    mean, _ = pair
    # Timings vary by more than a hundredth of a second, and long ones by more than a second.
    return missing if math.isnan(mean) else _with_deviation(pair, 2 if mean < 100 else 0)


def _with_deviation(pair: tuple[float, float], digits: int) -> str:
    mean, deviation = pair
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def _summary_csv(rows: Sequence[dict[str, Any]]) -> str:
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


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV. A row may lack columns, as the row of a diverged run does."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
