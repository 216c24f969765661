"""Writing that is whole or not at all, and checksums that show what was changed since."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from optalr.experiments.errors import ExperimentError, writing
from optalr.experiments.records.signals import held

# As `sha256sum` writes it, so that `sha256sum -c SHA256SUMS` checks a folder without optalr.
SUMS = "SHA256SUMS"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by a complete new one, or leave it as it was.

    Args:
      path: the file.
      content: text, which is written as UTF-8, or bytes.

    Raises:
      ExperimentError: the system refused.
    """
    # The process number keeps two processes out of each other's way.
    scratch = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    data = content.encode() if isinstance(content, str) else content
    with held(), writing(path):
        try:
            with open(scratch, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which then becomes ``path``, or leave nothing.

    Raises:
      ExperimentError: the system refused.
    """
    # Renaming is atomic. The process number keeps two processes out of each other's way.
    scratch = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    with held(), writing(path):
        try:
            scratch.mkdir(parents=True)
            yield scratch
            for file in (*(p for p in scratch.rglob("*") if p.is_file()), scratch):
                sync(file)
            os.rename(scratch, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_folder(path: Path) -> None:
    """Delete a folder so that an interruption leaves no half of it under its own name."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path, names: Iterable[str]) -> str:
    """Return the text of ``SHA256SUMS`` for those of the named files that are there."""
    present = [name for name in names if (folder / name).is_file()]
    return "".join(f"{digest(folder / name)}  {name}\n" for name in present)


def read_sums(folder: Path) -> dict[str, str]:
    """Return file name to checksum; empty where the folder has no ``SHA256SUMS``.

    Raises:
      ExperimentError: a line of it is damaged.
    """
    try:
        text = (folder / SUMS).read_bytes().decode("ascii")
        pairs = [line.split("  ", 1) for line in text.splitlines()]
        return {name: value for value, name in pairs}
    except FileNotFoundError:
        return {}
    except ValueError:  # not ASCII, or a line without its two columns
        raise ExperimentError(f"{folder / SUMS} is damaged.") from None


def changed_files(folder: Path, *names: str) -> list[str]:
    """Return what ``SHA256SUMS`` lists and is missing or has another checksum.

    Args:
      folder: the folder.
      *names: look at these files only.

    Raises:
      ExperimentError: ``SHA256SUMS`` itself is damaged.
    """
    return [
        name
        for name, value in read_sums(folder).items()
        if (not names or name in names)
        and (not (folder / name).is_file() or digest(folder / name) != value)
    ]


def free_path(path: Path) -> Path:
    """Return ``path``, or the first of ``path-2``, ``path-3``, ... that is not taken."""
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.stem}-{count}{path.suffix}")
    return candidate
