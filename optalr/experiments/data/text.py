"""Text, a symbol at a time."""

import math
from pathlib import Path

import numpy as np

from optalr.experiments.data.dataset import Raw, Split
from optalr.experiments.data.sources import Search
from optalr.experiments.errors import ExperimentError

_TEST_FRACTION = 0.1


def text(search: Search, pattern: str = "*.txt", context: int = 64) -> Raw:
    """Load the text files of a folder as one sequence of characters.

    The last tenth is the test set. An example is ``context`` characters, its target the same
    moved on by one.

    Args:
      search: ``data.folder`` names the folder, or one file.
      pattern: which files of the folder.
      context: characters an example.
    """
    if not search.folder:
        raise ExperimentError("data 'text' needs data.folder: name a folder of .txt files.")
    place = Path(search.folder).expanduser()
    files = [place] if place.is_file() else sorted(place.glob(pattern))
    if not files:
        raise ExperimentError(f"data.folder {place} holds no {pattern} files: name another.")
    try:
        whole = "\n".join(path.read_text(encoding="utf-8") for path in files)
    except UnicodeDecodeError as error:
        raise ExperimentError(f"a text in {place} is not UTF-8 ({error.reason}).") from None
    return _sequences(whole, context)


def python_docs(context: int = 64) -> Raw:
    """Load the language reference that every Python installation carries (about 700 kB).

    Args:
      context: characters an example.
    """
    from pydoc_data.topics import topics

    return _sequences("\n".join(topics[name] for name in sorted(topics)), context)


def _sequences(whole: str, context: int) -> Raw:
    if context < 1:
        raise ExperimentError(f"data.context must be at least 1, got {context}.")
    symbols, codes = np.unique(
        np.frombuffer(whole.encode("utf-32-le"), np.uint32), return_inverse=True
    )
    codes = codes.astype(np.int32)
    cut = len(codes) - math.ceil(_TEST_FRACTION * len(codes))
    parts = []
    for stretch in (codes[:cut], codes[cut:]):
        number = (len(stretch) - 1) // context
        if number < 1:
            raise ExperimentError(
                f"{len(codes)} characters are too few for data.context {context}: lower it."
            )
        x = stretch[: number * context].reshape(number, context)
        y = stretch[1 : number * context + 1].reshape(number, context)
        parts.append(Split(x, y))
    return Raw(parts[0], parts[1], "language", len(symbols), "none")
