"""Errors that a user can mend. Each is one line that names the thing and the remedy."""

import difflib
import errno
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What is wrong but stops nothing. The command line prints it as one line on standard error.
warnings_log = logging.getLogger("optalr")

# Why the system refused, in words.
_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the disk can only be read",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "it lies below a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENOENT: "its folder is not there (moved or deleted?)",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ELSEWHERE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR)


class ExperimentError(Exception):
    """A mistake in a config, a file or an argument, which the command line prints as one line.

    Attributes:
      shared: whether every process of the run ends with it, where there are several.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
        self.shared = False


class TrainingDivergedError(ExperimentError):
    """Training met a loss or parameters that are not finite and was stopped."""


class LostProcessError(ExperimentError):
    """Another of the processes that train a run together has ended without a word."""


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
        remedy = ""
        if error.errno in _FULL:
            remedy = ": make room; what was written before is whole"
        if error.errno in _ELSEWHERE:
            remedy = ": name another place with --out"
        raise ExperimentError(f"cannot write {path}: {cause_of(error)}{remedy}.") from error


def cause_of(error: OSError) -> str:
    """Return why the system refused."""
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
