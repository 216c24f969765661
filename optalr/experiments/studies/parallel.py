"""Several runs at once, each in a process of its own."""

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from optalr.experiments.errors import ExperimentError
from optalr.experiments.records.signals import Interruption, StopRequest, handled

# What a run says while it trains, in its own folder.
OUTPUT = "output.txt"
_DIVERGED = 3
_LOOK_SECONDS = 0.1


def resume_side_by_side(
    paths: Sequence[Path], jobs: int, show: Callable[[str], None], *, force: bool = False
) -> None:
    """Go on with the runs in ``paths``, up to ``jobs`` of them at once.

    Each is ``optalr resume`` in a process of its own, so it computes what it would compute alone.
    Where CUDA_VISIBLE_DEVICES names several devices, each process gets one of them.

    Args:
      paths: run folders.
      jobs: processes at once, >= 1.
      show: is told of each run that has come to an end.
      force: as for ``optalr resume``.

    Raises:
      Interruption: a signal asked to stop; the runs under way have stopped as well.
      ExperimentError: a run could not go on. The others under way are finished first.
    """
    if jobs < 1:
        raise ExperimentError(f"--jobs must be at least 1, got {jobs}.")
    waiting, failed = deque(paths), []
    free = deque(_devices(jobs))
    running: dict[Path, tuple[subprocess.Popen[bytes], str]] = {}
    stop, told = StopRequest(), False
    with handled(stop):
        while running or (waiting and not failed and stop.number is None):
            while waiting and free and not failed and stop.number is None:
                path, device = waiting.popleft(), free.popleft()
                running[path] = _start(path, device, force), device
            if stop.number is not None and not told:
                told = True  # a second signal would end them before they have saved
                for process, _ in running.values():
                    process.terminate()
            time.sleep(_LOOK_SECONDS)
            for path, code in list(_ended(running)):
                free.append(running.pop(path)[1])
                show(f"{path.name}: {_OUTCOMES.get(code, f'exit code {code}')}")
                if code not in _OUTCOMES:
                    failed.append(path)
    if stop.number is not None:
        raise Interruption(stop.number)
    if failed:
        raise ExperimentError(f"{failed[0]} could not go on: {_last_line(failed[0])}")


_OUTCOMES = {0: "finished", _DIVERGED: "diverged"}


def _devices(jobs: int) -> list[str]:
    """Return what each process at once shall see of the devices; empty leaves it as it is."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [visible[i % len(visible)] for i in range(jobs)]


def _start(path: Path, device: str, force: bool) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if device:
        environment["CUDA_VISIBLE_DEVICES"] = device
    words = [sys.executable, "-m", "optalr", "resume", str(path), *(["--force"] if force else [])]
    with open(path / OUTPUT, "ab") as output:
        # Apart from the terminal, whose Ctrl-C would reach it beside the signal from here.
        return subprocess.Popen(
            words, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def _ended(
    running: dict[Path, tuple[subprocess.Popen[bytes], str]],
) -> Iterator[tuple[Path, int]]:
    for path, (process, _) in running.items():
        code = process.poll()
        if code is not None:
            yield path, code


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = (path / OUTPUT).read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1].removeprefix("optalr: error: ") if lines else ""
    return ""
