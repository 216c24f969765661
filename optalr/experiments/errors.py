"""Errors that a user can mend. Each is one line that names the thing and the remedy."""

import difflib
import errno
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What is wrong but stops nothing. The command line prints it as one line on standard error.
warnings_log = logging.getLogger("optalr")

_ELSEWHERE = "name another place with --out"
# Why the system refused, and what to do about it.
_CAUSES = {
    errno.ENOSPC: "the disk is full: make room; what was written before is whole",
    errno.EDQUOT: "your quota of the disk is used up: make room; what was written before is whole",
    errno.EROFS: f"the disk can only be read: {_ELSEWHERE}",
    errno.EACCES: f"you may not write there: {_ELSEWHERE}",
    errno.EPERM: f"you may not write there: {_ELSEWHERE}",
    errno.ENAMETOOLONG: f"the name is too long: {_ELSEWHERE}",
    errno.ENOTDIR: f"it lies below a file, not a folder: {_ELSEWHERE}",
    errno.EISDIR: f"it is a folder, not a file: {_ELSEWHERE}",
    errno.ENOENT: "its folder is not there: was it moved or deleted?",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
}


class ExperimentError(Exception):
    """A mistake in a config, a file or an argument, which the command line prints as one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class TrainingDivergedError(ExperimentError):
    """Training met a loss or parameters that are not finite and was stopped."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses into one line that says why and what to do.

    Args:
      path: what is written.

    Raises:
      ExperimentError: the system refused.
    """
    try:
        yield
    except OSError as error:
        raise ExperimentError(f"cannot write {path}: {cause_of(error)}.") from error


def cause_of(error: OSError) -> str:
    """Return why the system refused and what to do, as far as is known."""
    return _CAUSES.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return ``did you mean ...?`` with the nearest of ``valid``, or the list of all."""
    choices = sorted(valid)
    section, _, last = name.rpartition(".")
    # In the same section first: `method.learning_rat` is nearer to `method.learning_rate` than to
    # any key whose section alone agrees. Then the same last word in another section.
    own = {c.rpartition(".")[2]: c for c in choices if c.rpartition(".")[0] == section}
    any_section = {c.rpartition(".")[2]: c for c in choices}
    for words, pattern, cutoff in (
        (own, last, 0.6),
        (any_section, last, 0.99),
        ({choice: choice for choice in choices}, name, 0.5),
    ):
        nearest = difflib.get_close_matches(pattern, words, n=1, cutoff=cutoff)
        if nearest:
            return f"did you mean {words[nearest[0]]!r}?"
    return "valid: " + ", ".join(choices) + "."
