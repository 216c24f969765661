"""Stored runs: one file a problem, one line a run, so that a bench that was stopped goes on."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

FOLDER = pathlib.Path(__file__).parents[1] / "results" / "untuned"

Record = dict[str, Any]


def key(record: Record) -> tuple[Any, ...]:
    """Return what tells a run from others: a run in a grid has fewer points than a reported one."""
    numbers = tuple(sorted(record["numbers"].items()))
    return record["method"], numbers, record["seed"], record["num_points"]


class Store:
    """The runs of one problem."""

    def __init__(self, problem: str, folder: pathlib.Path = FOLDER):
        self.path = folder / f"{problem}.jsonl"
        self.runs: dict[tuple[Any, ...], Record] = {}
        if self.path.exists():
            # A last line that was cut off by an interruption is run again.
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.runs[key(record)] = record

    def add(self, record: Record) -> None:
        """Store a run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.runs[key(record)] = record
        text = json.dumps(record)
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write(("\n" if cut and self.path.stat().st_size else "") + text + "\n")

    def forget(self, methods: Iterable[str]) -> None:
        """Drop all runs of some methods, because their code has changed."""
        dropped = set(methods)
        kept = {name: run for name, run in self.runs.items() if run["method"] not in dropped}
        if len(kept) < len(self.runs):
            self.runs = kept
            lines = "".join(json.dumps(run) + "\n" for run in kept.values())
            partial = self.path.with_suffix(".partial")
            partial.write_text(lines)
            partial.replace(self.path)

    def of(self, method: str, num_points: int) -> list[Record]:
        """Return the runs of a method with so many points."""
        runs = self.runs.values()
        return [r for r in runs if (r["method"], r["num_points"]) == (method, num_points)]


def final(record: Record) -> list[float]:
    """Return the last row of a run: step, then loss and score on training, validation and test."""
    return record["curve"][-1]


def chosen(grid: list[Record]) -> dict[str, float]:
    """Return the numbers of the run with the lowest final validation loss.

    Where all runs of the grid broke off, the first one's are as good as any.
    """
    finite = [run for run in grid if abs(final(run)[3]) < float("inf")]
    return min(finite or grid[:1], key=lambda run: final(run)[3])["numbers"]
