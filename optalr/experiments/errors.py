"""Errors that a user can mend. Each is one line that names the thing and the remedy."""

import difflib
from collections.abc import Iterable


class ExperimentError(Exception):
    """A mistake in a config, a file or an argument, which the command line prints as one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class TrainingDivergedError(ExperimentError):
    """Training met a loss or parameters that are not finite and was stopped."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return ``did you mean ...?`` with the nearest of ``valid``, or the list of all."""
    choices = sorted(valid)
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    # Same last word in another section: `learning_rate` for `method.learning_rate`.
    last = [choice for choice in choices if choice.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if last:
        return f"did you mean {last[0]!r}?"
    return "valid: " + ", ".join(choices) + "."
