"""Reading files, gzip files and tar archives within the memory that their contents can need.

Nothing is unpacked to disk. What a file says of its own size is compared with what its format can
need before any of it is read, since a few bytes can announce more than any memory.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from optalr.experiments.errors import ExperimentError, cause_of

_ARCHIVES = (".tar", ".tar.gz", ".tgz")
# A gzip file is at most that much longer than what it holds, where that cannot be compressed.
_OVERHEAD = 1 << 20
# Names and dates of a member take a few hundred bytes.
_HEADER = 1 << 16
# Data sets here have at most a few hundred files.
_MOST_MEMBERS = 100_000


def read_file(path: Path, most: int) -> bytes:
    """Return the contents of a file.

    Raises:
      ExperimentError: it has more than ``most`` bytes, or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > most:
            raise ExperimentError(
                f"{path} has {size} bytes, and the right file at most {most}: refused."
            )
        return path.read_bytes()
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {cause_of(error)}.") from None


def read_unpacked(path: Path, most: int) -> bytes:
    """Return the contents of a file, those of a gzip file unpacked.

    Raises:
      ExperimentError: there are more than ``most`` bytes, or the file cannot be read.
    """
    if not path.name.endswith(".gz"):
        return read_file(path, most)
    return decompress(str(path), read_file(path, most + _OVERHEAD), most)


def decompress(name: str, content: bytes, most: int) -> bytes:
    """Return the contents of a gzip file.

    Raises:
      ExperimentError: the file is cut short, damaged, or unpacks to more than ``most`` bytes.
    """
    # Not gzip.decompress, which has no limit: a small file can unpack to more than the memory.
    try:
        engine = zlib.decompressobj(16 + zlib.MAX_WBITS)
        plain = engine.decompress(content, most + 1)
    except zlib.error as error:
        raise ExperimentError(f"{name} is no gzip file ({error}): fetch it again.") from None
    if len(plain) > most:
        raise ExperimentError(
            f"{name} unpacks to more than the {most} bytes that the right file has: refused."
        )
    if not engine.eof:
        raise ExperimentError(f"{name} is cut short: fetch it again.")
    return plain


def is_archive(path: Path) -> bool:
    """Return whether a file's name is that of a tar archive."""
    return path.name.endswith(_ARCHIVES)


def read_archive(path: Path, chosen: Callable[[str], bool], most: int) -> dict[str, bytes]:
    """Return name to contents of those files in a tar archive whose names are ``chosen``.

    Args:
      path: the archive, compressed or not.
      chosen: whether a name, relative to the archive's root, is wanted.
      most: the bytes that all chosen files together can have.

    Raises:
      ExperimentError: it is no archive, is cut short, holds too much, or has a member whose name
        leads elsewhere.
    """
    contents: dict[str, bytes] = {}
    try:
        with open(path, "rb") as file, _stream(file) as plain:
            stream = _Bounded(path, plain, most)
            # "r:" since the stream is uncompressed by now.
            with tarfile.open(fileobj=stream, mode="r:") as archive:  # type: ignore[arg-type]
                for member in archive:
                    _refuse_unsafe(path, member)
                    name = os.path.normpath(member.name)
                    if member.isfile() and chosen(name):
                        contents[name] = stream.contents(archive, member)
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        raise ExperimentError(
            f"{path} is cut short or no tar archive ({error}): fetch it again."
        ) from None
    except OSError as error:  # among them gzip.BadGzipFile, which has no errno
        told = f"cannot be read ({cause_of(error)})" if error.errno else f"is damaged ({error})"
        raise ExperimentError(
            f"{path} {told}, or cut short or no tar archive: fetch it again."
        ) from None
    return contents


def _stream(file: IO[bytes]) -> Any:
    """Return the uncompressed stream of an archive."""
    magic = file.read(2)
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file


class _Bounded:
    """A stream that refuses to read more at once, or further, than a data set can need."""

    def __init__(self, path: Path, stream: IO[bytes], most: int):
        self._path, self._stream, self._most = path, stream, most
        self._at_once = _HEADER
        self._left, self._reads = most, 4 * _MOST_MEMBERS

    def contents(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        """Return the contents of a member, if what is left of the allowance holds them."""
        self._left -= member.size
        if self._left < 0 or member.size < 0:
            raise ExperimentError(
                f"{self._path} holds more than the {self._most} bytes that the data can have: "
                "refused."
            )
        self._at_once = max(_HEADER, member.size)
        file = archive.extractfile(member)
        content = file.read() if file else b""
        self._at_once = _HEADER
        return content

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        self._reads -= 1
        if not 0 <= size <= self._at_once or self._reads < 0:
            raise ExperimentError(
                f"{self._path} has headers that no tar archive needs: refused. Fetch the archive "
                "from its official address."
            )
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to another place."""
        self._reads -= 1
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """Return the place."""
        return self._stream.tell()


def _refuse_unsafe(path: Path, member: tarfile.TarInfo) -> None:
    # Nothing is written to disk, so nothing could escape. But whoever made such an archive meant
    # harm, so the rest of it deserves no trust.
    parts = Path(member.name).parts
    if member.name.startswith(("/", "\\")) or ".." in parts or member.issym() or member.islnk():
        raise ExperimentError(
            f"{path} holds {member.name!r}, which leads out of its folder: refused. Fetch the "
            "archive from its official address."
        )
