"""A run or a comparison as it grows, seen from another process."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from optalr.experiments.errors import ExperimentError
from optalr.experiments.records.locks import owner_of
from optalr.experiments.records.rows import read_lines
from optalr.experiments.records.run_folder import EVALUATIONS, METRICS, RunFolder
from optalr.experiments.reports.console import console
from optalr.experiments.studies import compare

# The last rows of a file stand in its last bytes.
_TAIL_BYTES = 1 << 14
_SHOWN = ("loss", "accuracy", "absolute_error", "learning_rate", "phase")
_HEADER = ("run", "state", "step", "epoch", "measured", "last evaluation")


def watch(path: Path, *, every: float, once: bool) -> None:
    """Show how far a run or the runs of a comparison have come, until all are finished.

    Nothing in the folder is changed, and no lock is taken.

    Args:
      path: the folder.
      every: seconds between looks.
      once: look once only, as is done where the output is no terminal.

    Raises:
      ExperimentError: there is no run in the folder.
    """
    if not 0.1 <= every <= 3600:
        raise ExperimentError(f"--every must lie between 0.1 and 3600 seconds, got {every}.")
    folders = list(_folders(path))
    if once or not console.is_terminal:
        console.print(_table(folders))
        return
    with Live(_table(folders), console=console, auto_refresh=False) as live:
        while any(folder.path.exists() and folder.result() is None for folder in folders):
            time.sleep(every)
            live.update(_table(folders), refresh=True)


def _folders(path: Path) -> Iterator[RunFolder]:
    if not (path / compare.SPECIFICATION).is_file():
        yield RunFolder.open(path)
        return
    comparison = compare.open_comparison(path)
    for name in comparison.configs:
        for seed in comparison.seeds:
            yield RunFolder(comparison.run_path(name, seed))


def _table(folders: list[RunFolder]) -> Table:
    table = Table(*_HEADER)
    for folder in folders:
        table.add_row(folder.path.name, *_row(folder))
    return table


def _row(folder: RunFolder) -> tuple[str, ...]:
    if not folder.path.exists():
        return ("waiting", "", "", "", "")
    result = folder.result()
    state = result["status"] if result else _state(folder)
    row, evaluation = (_last_row(folder.path / name) for name in (METRICS, EVALUATIONS))
    measured = "  ".join(f"{name} {row[name]:.4g}" for name in _SHOWN if name in row)
    tested = "  ".join(
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in evaluation.items()
        if name.startswith("test_")
    )
    step, epoch = row.get("step", 0), row.get("epoch", 0.0)
    return (state, f"{step}", f"{epoch:.2f}", measured, tested)


def _state(folder: RunFolder) -> str:
    """Return the state of an unfinished run, as far as its folder tells."""
    # A process that was killed leaves its name, so the age of the last row stands beside it.
    state = "running" if owner_of(folder.path) else "interrupted"
    try:
        age = time.time() - (folder.path / METRICS).stat().st_mtime
    except OSError:
        return state
    return f"{state}, last row {max(0.0, age):.0f} s ago"


def _last_row(path: Path) -> dict[str, Any]:
    """Return the last whole row of a file, without reading all of it."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            content = file.read()
    except FileNotFoundError:
        return {}
    if size > _TAIL_BYTES:
        content = content[content.find(b"\n") + 1 :]
    lines = read_lines(content).intact
    return lines[-1].row if lines else {}
