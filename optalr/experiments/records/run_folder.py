"""The folder of a run: what it was, what it measured, and how to go on.

    config.toml        the resolved config, defaults included
    environment.json   versions, device, command
    metrics.jsonl      one line per step
    evaluations.jsonl  one line per evaluation
    checkpoints/       checkpoints, named by step
    result.json        written last: a folder without it is unfinished
    SHA256SUMS         checksums of what is complete, of all files once the run is finished
    curves.png

Files are replaced atomically. After an interruption a JSONL file may be ahead of the last
checkpoint. These lines are cut off before the run goes on.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optalr.experiments.configs.config import Config, to_table
from optalr.experiments.configs.files import load_config, to_toml
from optalr.experiments.errors import ExperimentError, warnings_log, writing
from optalr.experiments.records.identity import environment
from optalr.experiments.records.locks import locked
from optalr.experiments.records.rows import Lines, Standing, read_lines, to_json, to_lines
from optalr.experiments.records.signals import held
from optalr.experiments.records.writing import (
    SUMS,
    changed_files,
    new_folder,
    sums_of,
    sync,
    write_atomically,
)

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
_CONFIG, _ENVIRONMENT, _RESULT = "config.toml", "environment.json", "result.json"


class RunFolder:
    """A run on disk.

    Args:
      path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # The name of the run's identity, which its rows carry.
        self.run = ""
        self._standing: dict[str, Standing] = {}
        self._place: tuple[int, int] | None = None
        self._warned: set[str] = set()

    @classmethod
    def create(cls, path: str | Path, config: Config) -> "RunFolder":
        """Make a new folder, whole or not at all.

        Raises:
          ExperimentError: something is there already, or the system refused.
        """
        path = Path(path)
        check_free(path)
        with new_folder(path) as scratch:
            write_atomically(scratch / _CONFIG, to_toml(to_table(config)))
            write_atomically(scratch / _ENVIRONMENT, to_json(environment(), indent=2))
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open the folder of an earlier run.

        Raises:
          ExperimentError: there is no run in it.
        """
        path = Path(path)
        if not (path / _CONFIG).is_file():
            raise ExperimentError(
                f"{path} holds no run: name a folder that `optalr run` made, with its config.toml."
            )
        return cls(path)

    def config(self) -> Config:
        """Return the run's resolved config."""
        self._warn_if_changed(_CONFIG)
        return load_config(self.path / _CONFIG)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold a lock on the folder, so that two processes do not train into it at once."""
        with locked(self.path):
            self._place = _place(self.path)
            try:
                yield
            finally:
                self._place = None

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to a JSONL file, all of them or none.

        Raises:
          ExperimentError: the system refused, or the folder was moved or deleted under the run.
        """
        self.check_place()
        standing = self._stand(name)
        lines = to_lines(rows, after=standing.last, run=self.run)
        path = self.path / name
        with held(), writing(path), open(path, "ab") as file:
            size = file.tell()
            try:
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
                raise
        standing.add(lines)

    def _stand(self, name: str) -> Standing:
        """Return the standing of a JSONL file, without a last line that was cut short."""
        if name not in self._standing:
            path = self.path / name
            content = path.read_bytes() if path.exists() else b""
            if not content.endswith(b"\n") and content:
                with writing(path):
                    os.truncate(path, content.rfind(b"\n") + 1)
            self._standing[name] = Standing.of(read_lines(content).intact)
        return self._standing[name]

    def check_place(self) -> None:
        """Raise if the folder that the lock was taken in is no longer at its place."""
        if self._place is not None and _place(self.path) != self._place:
            raise ExperimentError(
                f"{self.path} was moved or deleted while its run was under way, which ends it: go "
                "on with `optalr resume` and the folder's new place."
            )

    def sync(self) -> None:
        """Wait until the JSONL files are on the disk, so that no checkpoint is ahead of them."""
        for name in (METRICS, EVALUATIONS):
            if (self.path / name).exists():
                with writing(self.path / name):
                    sync(self.path / name)

    def standing(self) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint notes of each JSONL file: its rows, and a checksum of them."""
        return {name: standing.note() for name, standing in self._standing.items()}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the intact lines of a JSONL file, and warn of what was damaged or lost."""
        lines = self._lines(name)
        problems = lines.problems
        if not problems and self._changed(name):
            problems = ["rows are missing at its end, or were changed, since the run finished"]
        if problems:
            warnings_log.warning("%s: %s; the rest is used.", self.path / name, ", ".join(problems))
        return [line.row for line in lines.intact]

    def cut(self, name: str, last_step: int, *, noted: Mapping[str, Any] | None = None) -> None:
        """Drop the lines of a JSONL file that are later than ``last_step``.

        Args:
          name: the file.
          last_step: the step of the checkpoint from which the run goes on.
          noted: what ``standing`` said when it was taken. What is lost since is named in a warning.
        """
        lines = self._lines(name)
        kept = [line for line in lines.intact if line.row.get("step", math.inf) <= last_step]
        standing = Standing.of(kept)
        if noted is not None and standing.note() != noted:
            self._warn_of_loss(name, lines, f"{len(kept)} of {noted['rows']}")
            # Numbers go on from where they stood, so that a gap stays to be seen.
            standing.last = int(noted["last"])
        write_atomically(self.path / name, "".join(line.text + "\n" for line in kept))
        self._standing[name] = standing

    def reopen(self) -> None:
        """Take back the checksums of files that change as the run goes on."""
        with writing(self.path / SUMS):
            (self.path / SUMS).unlink(missing_ok=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, which marks the run as finished, and checksums of all files."""
        lost = [
            f"{name}: {problem}"
            for name in (METRICS, EVALUATIONS)
            for problem in self._lines(name).problems
        ]
        text = to_json({**result, **({"lost": lost} if lost else {})}, indent=2) + "\n"
        files = (_CONFIG, _ENVIRONMENT, METRICS, EVALUATIONS)
        # Before the result, so that no result is ever without its checksum.
        total = hashlib.sha256(text.encode()).hexdigest()
        write_atomically(self.path / SUMS, sums_of(self.path, files) + f"{total}  {_RESULT}\n")
        write_atomically(self.path / _RESULT, text)

    def result(self) -> dict[str, Any] | None:
        """Return the result, or None while the run is unfinished.

        Raises:
          ExperimentError: the result was changed since it was written.
        """
        path = self.path / _RESULT
        if not path.exists():
            return None
        try:
            if self._changed(_RESULT):
                raise ValueError
            result = json.loads(path.read_text(encoding="utf-8"))
            return {k: math.nan if v is None else v for k, v in result.items()}
        except (ValueError, AttributeError):
            raise ExperimentError(
                f"{path} is damaged, or was changed since the run finished: delete it and `optalr "
                f"resume {self.path}`, which makes it again from the last checkpoint."
            ) from None

    def environment(self) -> dict[str, Any]:
        """Return what ``environment`` said when the run began."""
        self._warn_if_changed(_ENVIRONMENT)
        try:
            found = json.loads((self.path / _ENVIRONMENT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _lines(self, name: str) -> Lines:
        path = self.path / name
        return read_lines(path.read_bytes()) if path.exists() else Lines([], [])

    def _changed(self, name: str) -> bool:
        """Return whether a file is not as it was when the run finished."""
        try:
            return name in changed_files(self.path, name)
        except ExperimentError as error:
            warnings_log.warning("%s", error)
            return False

    def _warn_if_changed(self, name: str) -> None:
        if name not in self._warned and self._changed(name):
            self._warned.add(name)
            warnings_log.warning("%s was changed since the run wrote it.", self.path / name)

    def _warn_of_loss(self, name: str, lines: Lines, count: str) -> None:
        problems = ", ".join(lines.problems) or "rows are missing or were changed"
        warnings_log.warning(
            "%s: %s. %s rows before the checkpoint are left, and the run goes on without the "
            "others. To have them again, delete %s and resume: training then begins anew, and "
            "comes to the same bits.",
            self.path / name,
            problems,
            count,
            self.path / "checkpoints",
        )


def check_free(path: Path, *, remedy: str = "") -> None:
    """Raise if nothing new can be made at ``path``; nothing is left there.

    Args:
      path: the file or folder to be.
      remedy: what to do if something is there; by default to take another name, or to resume.

    Raises:
      ExperimentError: something is there already, or the system refuses.
    """
    with writing(path):
        if path.exists():
            resume = f"name another folder with --out, or go on with `optalr resume {path}`"
            raise ExperimentError(f"{path} exists and is not overwritten: {remedy or resume}.")
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir():
            raise NotADirectoryError(20, "", str(path))
        if not os.access(parent, os.W_OK):
            raise PermissionError(13, "", str(path))


def _place(path: Path) -> tuple[int, int] | None:
    """Return what identifies the folder at a place, whatever its name."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
