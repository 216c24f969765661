"""The folder of a run: what it was, what it measured, and how to go on.

    config.toml        the resolved config, defaults included
    environment.json   versions, device, command
    metrics.jsonl      one line per step
    evaluations.jsonl  one line per evaluation
    checkpoints/       Orbax checkpoints, named by step
    result.json        written last: a folder without it is unfinished
    curves.png

Files are replaced atomically. After an interruption a JSONL file may be ahead of the last
checkpoint. These lines are cut off before the run goes on.
"""

import fcntl
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from optalr.experiments.configs.config import Config, to_table
from optalr.experiments.configs.files import load_config, to_toml
from optalr.experiments.errors import ExperimentError

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
_PACKAGES = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy")


class RunFolder:
    """A run on disk.

    Args:
      path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, config: Config) -> "RunFolder":
        """Make a new folder, whole or not at all.

        Raises:
          ExperimentError: something is there already.
        """
        path = Path(path)
        if path.exists():
            raise ExperimentError(
                f"{path} exists and is not overwritten: name another folder with --out, or go on "
                f"with `optalr resume {path}`."
            )
        # Renaming is atomic. The process number keeps two processes out of each other's way.
        scratch = path.parent / f".{path.name}.{os.getpid()}"
        try:
            scratch.mkdir(parents=True)
            write_atomically(scratch / "config.toml", to_toml(to_table(config)))
            write_atomically(scratch / "environment.json", _json(environment(), indent=2))
            os.rename(scratch, path)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise ExperimentError(f"cannot make the run folder {path}: {error}.") from error
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open the folder of an earlier run.

        Raises:
          ExperimentError: there is no run in it.
        """
        path = Path(path)
        if not (path / "config.toml").is_file():
            raise ExperimentError(
                f"{path} holds no run: name a folder that `optalr run` made, with its config.toml."
            )
        return cls(path)

    def config(self) -> Config:
        """Return the run's resolved config."""
        return load_config(self.path / "config.toml")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold a lock on the folder, so that two processes do not train into it at once."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ExperimentError(
                    f"{self.path} is in use by another process: wait for it, or stop it."
                ) from None
            yield

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to a JSONL file."""
        text = "".join(_json(row) + "\n" for row in rows)
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(text)

    def sync(self) -> None:
        """Wait until the JSONL files are on the disk, so that no checkpoint is ahead of them."""
        for name in (METRICS, EVALUATIONS):
            if (self.path / name).exists():
                with open(self.path / name, "rb") as file:
                    os.fsync(file.fileno())

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a JSONL file, without a last line that was cut short."""
        path = self.path / name
        if not path.exists():
            return []
        found = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            found.append({k: math.nan if v is None else v for k, v in row.items()})
        return found

    def cut(self, name: str, last_step: int) -> None:
        """Drop the lines of a JSONL file that are later than ``last_step``."""
        kept = [row for row in self.rows(name) if row["step"] <= last_step]
        write_atomically(self.path / name, "".join(_json(row) + "\n" for row in kept))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, which marks the run as finished."""
        write_atomically(self.path / "result.json", _json(result, indent=2) + "\n")

    def result(self) -> dict[str, Any] | None:
        """Return the result, or None while the run is unfinished."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        return {k: math.nan if v is None else v for k, v in result.items()}


def environment() -> dict[str, Any]:
    """Return what the numbers depend on apart from the config."""
    import jax

    import optalr

    versions = {"optalr": optalr.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by a complete new one, or leave it as it was.

    Args:
      path: the file.
      content: text, which is written as UTF-8, or bytes.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    data = content.encode() if isinstance(content, str) else content
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def free_path(path: Path) -> Path:
    """Return ``path``, or the first of ``path-2``, ``path-3``, ... that is not taken."""
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


def _json(value: Any, indent: int | None = None) -> str:
    """Return JSON in which a number that is not finite is null, because JSON has no NaN."""

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(key): clean(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [clean(entry) for entry in item]
        if isinstance(item, float) and not math.isfinite(item):
            return None
        return item

    # Nearly all rows are finite; cleaning each would take longer than writing it.
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(clean(value), indent=indent)
