"""Finding the files of a data set.

The places to look are a folder of the user's, ``$OPTALR_DATA``, the system's folders and the cache.
Files are fetched only if the config allows it.

Nothing is unpacked to disk, and nothing in a file is executed. ``archives.py`` reads archives in
memory, after a check of every member's name, and ``restricted.py`` reads pickles.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from optalr.experiments.data.archives import (
    decompress,
    is_archive,
    read_archive,
    read_unpacked,
)
from optalr.experiments.errors import ExperimentError

ENVIRONMENT = "OPTALR_DATA"
# The largest file of a data set here, SVHN's extra images, has 1.6 GB: what unpacks to more than
# this is damaged or hostile.
MOST_BYTES = 1_700_000_000


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
    most: int = MOST_BYTES,
    system: Sequence[str] = (),
    inside: Sequence[str] = (),
    downloads: Sequence[Download] = (),
) -> dict[str, bytes]:
    """Return the contents of the wanted files, from the first place that has them all.

    Args:
      search: where to look.
      wanted: key to the names that its file can have (also with ``.gz``, which is decompressed).
      most: the bytes that one of these files can have, unpacked; more is refused.
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
        found = _read_all(place, wanted, inside, most=most)
        if found is not None:
            return found
    if search.download and downloads:
        _fetch(downloads, cache_folder(search.data))
        found = _read_all(cache_folder(search.data), wanted, inside, most=most)
        if found is not None:
            return found
    names = ", ".join(options[0] for options in wanted.values())
    looked = ", ".join(map(str, looked_in)) or "no folder"
    remedy = f"put {names} into a folder and name it in data.folder or ${ENVIRONMENT}"
    if downloads and not search.download:
        remedy += ", or set data.download=true"
    raise ExperimentError(f"data {search.data!r}: files not found in {looked}; {remedy}.")


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
    place: Path, wanted: Mapping[str, Sequence[str]], inside: Sequence[str], *, most: int
) -> dict[str, bytes] | None:
    """Return every wanted file, or None where ``place`` lacks one."""
    names = {n for options in wanted.values() for o in options for n in (o, o + ".gz")}
    files = _list_files(place, inside, _Wanted(names, most, most * len(wanted)))
    chosen = {}
    for key, options in wanted.items():
        name = next((n for option in options for n in (option, option + ".gz") if n in files), None)
        if name is None:
            return None
        chosen[key] = name
    # Files are read only now, so that nothing is read from a place that lacks one of them.
    return {key: files[name]() for key, name in chosen.items()}


class _Wanted(NamedTuple):
    """Which files of a place are wanted.

    Attributes:
      names: their names.
      most: the bytes that one of them can have.
      in_all: the bytes that all of them can have.
    """

    names: set[str]
    most: int
    in_all: int


def _list_files(place: Path, inside: Sequence[str], wanted: _Wanted) -> dict[str, Reader]:
    """Return base name to reader, of files in the folder and its subfolders and in its archives."""
    if place.is_file():
        return _archive_members(place, inside, wanted)
    if not place.is_dir():
        return {}
    files: dict[str, Reader] = {}
    for folder in (place, *(place / name for name in inside)):
        for name in sorted(wanted.names):
            path = folder / name
            if path.is_file():
                files.setdefault(name, functools.partial(read_unpacked, path, wanted.most))
    for path in sorted(place.iterdir()):
        if is_archive(path) and any(name in path.name for name in _stems(inside)):
            for name, reader in _archive_members(path, inside, wanted).items():
                files.setdefault(name, reader)
    return files


def _stems(inside: Sequence[str]) -> list[str]:
    """Return how archives' names begin: cifar-10-batches-py comes in cifar-10-python.tar.gz."""
    return ["-".join(name.split("-")[:2]) for name in inside]


def _archive_members(path: Path, inside: Sequence[str], wanted: _Wanted) -> dict[str, Reader]:
    """Return the members of a tar archive that lie in ``inside`` or at its root, by base name."""
    if not is_archive(path):
        return {path.name: functools.partial(read_unpacked, path, wanted.most)}

    def chosen(name: str) -> bool:
        folder, base = os.path.split(name)
        return folder in ("", *inside) and base in wanted.names

    contents = read_archive(path, chosen, wanted.in_all)
    return {
        os.path.basename(name): functools.partial(_unpacked, name, content, wanted.most)
        for name, content in contents.items()
    }


def _unpacked(name: str, content: bytes, most: int) -> bytes:
    return decompress(name, content, most) if name.endswith(".gz") else content


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
