"""Finding the files of a data set.

The places to look are a folder of the user's, ``$OPTALR_DATA``, the system's folders and the cache.
Files are fetched only if the config allows it.

Nothing is unpacked to disk, and nothing in a file is executed. Archives are read in memory, after a
check of every member's name, and pickles are read by ``restricted.py``.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from optalr.experiments.errors import ExperimentError

ENVIRONMENT = "OPTALR_DATA"
# The largest data set here, SVHN's extra images, stays below 2 GB: what unpacks to more than this
# is damaged or hostile.
_MAX_BYTES = 4 << 30
_ARCHIVES = (".tar", ".tar.gz", ".tgz")


class Download(NamedTuple):
    """A file that can be fetched.

    Attributes:
      url: its address.
      md5: the checksum that it must have.
    """

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


class Search(NamedTuple):
    """Where to look for the files of one data set.

    Attributes:
      data: the data's name, and that of its folder in the cache.
      folder: the user's folder; if given, no other place is searched.
      download: whether to fetch files that are found nowhere.
    """

    data: str
    folder: str = ""
    download: bool = False


Reader = Callable[[], bytes]


def cache_folder(data: str) -> Path:
    """Return the folder that keeps downloads of ``data``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "optalr" / data


def find(
    search: Search,
    wanted: Mapping[str, Sequence[str]],
    *,
    system: Sequence[str] = (),
    inside: Sequence[str] = (),
    downloads: Sequence[Download] = (),
) -> dict[str, bytes]:
    """Return the contents of the wanted files, from the first place that has them all.

    Args:
      search: where to look.
      wanted: key to the names that its file can have (also with ``.gz``, which is decompressed).
      system: folders into which packages of the operating system install the files.
      inside: subfolders, also of archives, in which the files can lie.
      downloads: what to fetch into the cache.

    Returns:
      Key to contents.

    Raises:
      ExperimentError: no place has the files (the message says where to put them), or a file is cut
        short or unsafe.
    """
    # All files come from one place, so that two versions of a data set are never mixed.
    looked_in = places(search, system)
    for place in looked_in:
        found = _read_all(place, wanted, inside)
        if found is not None:
            return found
    if search.download and downloads:
        _fetch(downloads, cache_folder(search.data))
        found = _read_all(cache_folder(search.data), wanted, inside)
        if found is not None:
            return found
    names = ", ".join(options[0] for options in wanted.values())
    looked = ", ".join(map(str, looked_in)) or "no folder"
    remedy = f"put {names} into a folder and name it in data.folder or ${ENVIRONMENT}"
    if downloads and not search.download:
        remedy += ", or set data.download=true"
    raise ExperimentError(f"data {search.data!r}: files not found in {looked}; {remedy}.")


def decompress(name: str, content: bytes) -> bytes:
    """Return the contents of a gzip file.

    Raises:
      ExperimentError: the file is cut short, damaged, or unpacks to far more than any data set.
    """
    # Not gzip.decompress, which has no limit: a small file can unpack to more than the memory.
    try:
        engine = zlib.decompressobj(16 + zlib.MAX_WBITS)
        plain = engine.decompress(content, _MAX_BYTES)
    except zlib.error as error:
        raise ExperimentError(f"{name} is no gzip file ({error}): fetch it again.") from None
    if engine.unconsumed_tail:
        raise ExperimentError(f"{name} unpacks to more than {_MAX_BYTES} bytes: refused.")
    if not engine.eof:
        raise ExperimentError(f"{name} is cut short: fetch it again.")
    return plain


def places(search: Search, system: Sequence[str] = ()) -> list[Path]:
    """Return the places to search, in order; a folder of the user's excludes all others.

    Raises:
      ExperimentError: the user's folder does not exist.
    """
    if search.folder:
        folder = Path(search.folder).expanduser()
        if not folder.exists():
            raise ExperimentError(f"data.folder {folder} does not exist: name an existing folder.")
        return [folder]
    found = [*map(Path, system), cache_folder(search.data)]
    base = os.environ.get(ENVIRONMENT)
    return [Path(base) / search.data, Path(base), *found] if base else found


def _read_all(
    place: Path, wanted: Mapping[str, Sequence[str]], inside: Sequence[str]
) -> dict[str, bytes] | None:
    """Return every wanted file, or None where ``place`` lacks one."""
    files = _list_files(place, inside)
    chosen = {}
    for key, names in wanted.items():
        name = next((n for option in names for n in (option, option + ".gz") if n in files), None)
        if name is None:
            return None
        chosen[key] = name
    # Files are read only now, so that nothing is read from a place that lacks one of them.
    found = {}
    for key, name in chosen.items():
        content = files[name]()
        found[key] = decompress(name, content) if name.endswith(".gz") else content
    return found


def _list_files(place: Path, inside: Sequence[str]) -> dict[str, Reader]:
    """Return base name to reader, of files in the folder and its subfolders and in its archives."""
    if place.is_file():
        return _archive_members(place, inside)
    if not place.is_dir():
        return {}
    files: dict[str, Reader] = {}
    for folder in (place, *(place / name for name in inside)):
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.is_file():
                    files.setdefault(path.name, path.read_bytes)
    for path in sorted(place.iterdir()):
        if path.name.endswith(_ARCHIVES) and any(name in path.name for name in _stems(inside)):
            for name, reader in _archive_members(path, inside).items():
                files.setdefault(name, reader)
    return files


def _stems(inside: Sequence[str]) -> list[str]:
    """Return how archives' names begin: cifar-10-batches-py comes in cifar-10-python.tar.gz."""
    return ["-".join(name.split("-")[:2]) for name in inside]


def _archive_members(path: Path, inside: Sequence[str]) -> dict[str, Reader]:
    """Return the members of a tar archive that lie in ``inside`` or at its root, by base name."""
    if not is_archive(path):
        return {path.name: path.read_bytes}
    contents = read_archive(path, lambda name: os.path.dirname(name) in ("", *inside))
    return {os.path.basename(k): (lambda content=v: content) for k, v in contents.items()}


def is_archive(path: Path) -> bool:
    """Return whether a file's name is that of a tar archive."""
    return path.name.endswith(_ARCHIVES)


def read_archive(path: Path, chosen: Callable[[str], bool]) -> dict[str, bytes]:
    """Return name to contents of those files in a tar archive whose names are ``chosen``.

    Raises:
      ExperimentError: it is no archive, is cut short, or has a member whose name leads elsewhere.
    """
    contents: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                _refuse_unsafe(path, member)
                name = os.path.normpath(member.name)
                if not member.isfile() or not chosen(name):
                    continue
                total += member.size
                if total > _MAX_BYTES:
                    raise ExperimentError(f"{path} holds more than {_MAX_BYTES} bytes: refused.")
                file = archive.extractfile(member)
                contents[name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ExperimentError(
            f"{path} is cut short or no tar archive ({error}): fetch it again."
        ) from None
    return contents


def _refuse_unsafe(path: Path, member: tarfile.TarInfo) -> None:
    # Nothing is written to disk, so nothing could escape. But whoever made such an archive meant
    # harm, so the rest of it deserves no trust.
    parts = Path(member.name).parts
    if member.name.startswith(("/", "\\")) or ".." in parts or member.issym() or member.islnk():
        raise ExperimentError(
            f"{path} holds {member.name!r}, which leads out of its folder: refused. Fetch the "
            "archive from its official address."
        )


def _fetch(downloads: Sequence[Download], folder: Path) -> None:
    import pooch  # slow to import, and seldom needed

    for download in downloads:
        try:
            pooch.retrieve(
                download.url, known_hash=f"md5:{download.md5}", fname=download.name, path=folder
            )
        except ValueError as error:
            raise ExperimentError(
                f"{download.url} does not have the checksum {download.md5} and was not kept: try "
                f"again, or fetch it elsewhere and name its folder in data.folder ({error})."
            ) from None
        except Exception as error:  # whatever requests raises
            raise ExperimentError(
                f"cannot fetch {download.url} ({type(error).__name__}): fetch it elsewhere and "
                "name its folder in data.folder."
            ) from None
