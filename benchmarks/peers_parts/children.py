"""The processes that make the runs: one at a time, on one core, ended with their parent."""

import dataclasses
import os
import pathlib
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence

from ..untuned_parts.running import NUM_GRID_POINTS, NUM_POINTS
from ..untuned_parts.storing import Record, Store
from . import environments
from .methods import Entry
from .worker import Request, store_failure

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a child that is asked to end may take for it.
PATIENCE = 5.0


def settings() -> dict[str, str]:
    """Return a child's environment: one core, no other packages, one more path."""
    one_core = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    dropped = {"PYTHONHOME", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "PYTHONNOUSERSITE": "1",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {one_core}".strip(),
    }


def commit() -> str:
    """Return which code runs; a + says that it is not as committed."""

    def git(*command: str) -> str:
        found = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip()

    code = ("optalr", "benchmarks/peers.py", "benchmarks/peers_parts", "benchmarks/untuned_parts")
    changed = "+" if git("status", "--porcelain", "--", *code) else ""
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{changed}"


def made_by(method: Entry) -> dict[str, str]:
    """Return what a record says of where it comes from."""
    return {
        "code": commit(),
        "jax": environments.JAX[0].removeprefix("jax=="),
        "packages": environments.versions(method.environment),
        "machine": f"{platform.system()} {platform.machine()}, one of {os.cpu_count()} cores, CPU",
    }


def wait(child: subprocess.Popen, deadline: float) -> int | None:
    """Return how a process ended, None if it was ended at the deadline.

    Whatever stops this one, an interruption included, ends the child first.
    """
    try:
        return child.wait(None if deadline == float("inf") else deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@dataclasses.dataclass(frozen=True)
class Untrained:
    """What a failure needs to know of a method's runs."""

    grid: Sequence[dict[str, float]]
    points: tuple[int, int] = (NUM_POINTS, NUM_GRID_POINTS)

    def run(self, numbers: dict[str, float], *, seed: int, num_points: int) -> Record:
        raise NotImplementedError("runs are made in the method's environment")


def fail(request: Request, method: Entry, error: Exception) -> None:
    """Store that a method cannot run on a problem, if no run of it could be made."""
    store = Store(request.problem, pathlib.Path(request.folder))
    if any(run["method"] == method.name for run in store.runs.values()):
        print(f"{request.problem}, {method.name}: {error}", flush=True)
    else:
        store_failure(request, store, Untrained(method.grid), error)


def run(request: Request, method: Entry, where: pathlib.Path, *, deadline: float) -> None:
    """Make all runs of a method on a problem that are not stored yet.

    Args:
      request: for the worker.
      method: whose environment it needs.
      where: the folder of the environments.
      deadline: on the monotonic clock; the worker is ended there.
    """
    try:
        python = environments.make(method.environment, where)
    except environments.InstallError as error:
        fail(request, method, error)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "request.json"
        request.write(path)
        command = [python, "-m", "benchmarks.peers_parts.worker", path]
        child = subprocess.Popen(command, env=settings(), cwd=ROOT)
        status = wait(child, deadline)
    if status:
        fail(request, method, ChildProcessError(f"its process ended with {status}"))
