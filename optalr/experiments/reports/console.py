"""What a person sees in the terminal: progress and tables."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from optalr.experiments.training.loop import Report

# A log file has no width; 80 columns would fold every table.
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)


@contextmanager
def progress(title: str, score_name: str, lines: int = 10) -> Iterator[Report]:
    """Show a bar with loss, score, learning rate and phase; yield the function that updates it.

    Args:
      title: what is trained.
      score_name: the score's name in the rows.
      lines: how many plain lines to print instead if the output is a log file, not a terminal.
    """
    if not console.is_terminal:
        yield _plain_lines(title, score_name, lines)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        # Nothing is reported before the first epoch, and the first thing in it is to compile.
        task = bar.add_task(title, total=None, numbers="compiling")

        def report(row: dict[str, Any]) -> None:
            bar.update(
                task,
                completed=row["step"],
                total=row["total_steps"],
                numbers=_numbers(row, score_name),
            )

        yield report


def _plain_lines(title: str, score_name: str, lines: int) -> Report:
    """Return a report function that prints a line whenever another part of the run is done."""
    shown = 0

    def report(row: dict[str, Any]) -> None:
        nonlocal shown
        part = lines * row["step"] // row["total_steps"]
        if part > shown:
            shown = part
            console.print(
                f"{title} step {row['step']}/{row['total_steps']} {_numbers(row, score_name)}",
                soft_wrap=True,
            )

    return report


def _numbers(row: Mapping[str, Any], score_name: str) -> str:
    # Not every method has a rate or a phase to show.
    parts = [f"loss {row['loss']:.4f}", f"{score_name} {row[score_name]:.3f}"]
    if "learning_rate" in row:
        parts.append(f"rate {row['learning_rate']:.2e}")
    if "phase" in row:
        parts.append(f"phase {row['phase']:.2g}")
    return "  ".join(parts)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: names aligned left in the first column, numbers right in the others.

    No word is broken. Where the terminal is too narrow for that, each row becomes a paragraph.
    """
    console.print(title, soft_wrap=True)
    table = Table()
    for i, name in enumerate(header):
        words = [word for row in (header, *rows) for word in row[i].split()]
        widest = max(map(len, words), default=0)
        # The first column holds names, which are hard to read in pieces.
        longest = max(map(len, (row[0] for row in rows)), default=0) if i == 0 else 0
        width = max(widest, min(longest, console.width // 3))
        table.add_column(name, justify="left" if i == 0 else "right", min_width=width)
    for row in rows:
        table.add_row(*row)
    if Measurement.get(console, console.options, table).minimum <= console.width:
        console.print(table)
        return
    for first, *others in rows:
        console.print(first, soft_wrap=True)
        for name, cell in zip(header[1:], others, strict=True):
            console.print(f"  {name}: {cell}", soft_wrap=True)
