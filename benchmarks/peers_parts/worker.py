"""All runs of one method on one problem, in the method's environment.

    python -m benchmarks.peers_parts.worker REQUEST

REQUEST is a JSON file with the fields of ``Request``. Each run is stored as soon as it has ended,
and a stored one is not made again, so a worker may be killed at any time. A method that fails is
stored too, with what it said.
"""

import dataclasses
import json
import os
import pathlib
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..untuned_parts.storing import Record, Store, chosen, final, key


@dataclasses.dataclass(frozen=True)
class Request:
    """What a worker is asked for.

    Attributes:
      problem: of ``untuned_parts.problems``.
      method: of ``peers_parts.methods``.
      seeds: of the runs that are reported; the first one's is also the grid's.
      folder: where runs are stored.
      made_by: what each record says of its origin.
    """

    problem: str
    method: str
    seeds: Sequence[int]
    folder: str
    made_by: dict[str, str]

    @classmethod
    def read(cls, path: pathlib.Path) -> "Request":
        """Read what ``write`` wrote."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: pathlib.Path) -> None:
        """Write a file for ``read``."""
        path.write_text(json.dumps(dataclasses.asdict(self)))


class Trainer(Protocol):
    """Makes one run: ``untuned_parts.running.Runner`` with a problem, or a test's stand-in."""

    grid: Sequence[dict[str, float]]
    points: tuple[int, int]

    def run(self, numbers: dict[str, float], *, seed: int, num_points: int) -> Record:
        """Return curve, seconds, seconds of compilation and bytes of the state."""
        ...


class Training:
    """A method on a problem, compiled once for all its runs."""

    def __init__(self, problem: str, method: str):
        # After the parent process has been seen to live: these take seconds.
        from ..untuned_parts.problems import load_problem
        from ..untuned_parts.running import NUM_GRID_POINTS, NUM_POINTS
        from .methods import METHODS

        entry = METHODS[method]
        self.grid, self.points = entry.grid, (NUM_POINTS, NUM_GRID_POINTS)
        self.load = lambda seed: load_problem(problem, seed)
        self.runner = entry.runner()(self.load(0), entry)

    def run(self, numbers: dict[str, float], *, seed: int, num_points: int) -> Record:
        return self.runner.run(self.load(seed), numbers, seed=seed, num_points=num_points)


def peak_bytes() -> int:
    """Return the most memory that this process has held so far."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # Not getrusage: there a child begins with what its parent held.
        (held,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return 1024 * int(held)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def wanted(store: Store, method: str, trainer: Trainer, seeds: Sequence[int]) -> Iterator[Record]:
    """Yield the runs to be made, the grid first; what it chose is known once it is done."""
    points, grid_points = trainer.points
    numbers = trainer.grid[0]
    if len(trainer.grid) > 1:
        for numbers in trainer.grid:
            yield {"numbers": numbers, "seed": seeds[0], "num_points": grid_points}
        numbers = chosen(store.of(method, grid_points))
    for seed in seeds:
        yield {"numbers": numbers, "seed": seed, "num_points": points}


def store_failure(request: Request, store: Store, trainer: Trainer, error: Exception) -> None:
    """Store that a method cannot run, as a grid and a run that broke off before the first step."""
    said = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {said}"[:300]
    print(f"{request.problem}, {request.method}: {text}", flush=True)
    for num_points in trainer.points:
        store.add(
            {
                "problem": request.problem,
                "method": request.method,
                "numbers": trainer.grid[0],
                "seed": request.seeds[0],
                "num_points": num_points,
                "seconds": 0.0,
                "curve": [[0, *[float("nan")] * 6]],
                "error": text,
                **request.made_by,
            }
        )


def work(request: Request, trainer: Trainer) -> None:
    """Make all runs that are not stored yet; none more where the method has failed."""
    store = Store(request.problem, pathlib.Path(request.folder))
    base, first = peak_bytes(), True
    for run in wanted(store, request.method, trainer, request.seeds):
        named = {"problem": request.problem, "method": request.method, **run}
        if key(named) in store.runs:
            if "error" in store.runs[key(named)]:
                return
            continue
        start = time.perf_counter()
        try:
            made = trainer.run(run["numbers"], seed=run["seed"], num_points=run["num_points"])
        except Exception as error:
            store_failure(request, store, trainer, error)
            return
        whole = round(time.perf_counter() - start, 2)
        if first:
            made["peak_bytes"] = peak_bytes() - base
        else:  # compiled before: it says nothing of a method's cost
            del made["compile_seconds"]
        first = False
        told = {"whole_seconds": whole, "load": round(os.getloadavg()[0], 1)}
        store.add({**named, **made, **told, **request.made_by})
        print(line({**named, **made, **told}), flush=True)


def line(record: Record) -> str:
    """Return what is shown of a run."""
    row = final(record)
    name = f"{record['problem']:18} {record['method']:14} {record['numbers']} seed {record['seed']}"
    losses = f"train {row[1]:.4g}, validation {row[3]:.4g}, test {row[5]:.4g} {row[6]:.4g}"
    return f"{name}: {losses}, {record['seconds']:.2f} s of {record['whole_seconds']:.1f}"


def end_with(parent: int) -> None:
    """End this process once its parent has gone: a killed bench leaves none behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(path: str, make: Any = Training) -> None:
    end_with(os.getppid())
    request = Request.read(pathlib.Path(path))
    work(request, make(request.problem, request.method))


if __name__ == "__main__":
    main(sys.argv[1])
