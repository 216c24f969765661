"""What a function can be given, from its signature and its docstring."""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from optalr.experiments.configs.calling import accepted

# What the runner hands in, which no config can set.
_GIVEN = ("learning_rate", "num_classes", "search", "steps_per_epoch", "total_steps", "phase")


class Option(NamedTuple):
    """An argument that a config can set.

    Attributes:
      name: its key.
      default: its default as text, or what it needs.
      text: what its docstring says.
    """

    name: str
    default: str
    text: str


class Description(NamedTuple):
    """A function as a config sees it.

    Attributes:
      summary: the first sentence of its docstring.
      options: the arguments that a config can set.
    """

    summary: str
    options: list[Option]


def describe(function: Callable[..., Any]) -> Description:
    """Return what ``function`` does, and the keys that a config can set for it."""
    text = inspect.getdoc(function) or ""
    told = _arguments(text)
    options = [
        Option(name, _default(parameter), told.get(name, ""))
        for name, parameter in accepted(function).items()
        if name not in _GIVEN
    ]
    return Description(" ".join(text.split("\n\n")[0].split()), options)


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "(needed)"
    # Functions and arrays print as what no config can hold.
    return repr(parameter.default) if not callable(parameter.default) else "(a function)"


def _arguments(text: str) -> dict[str, str]:
    """Return argument to description, from a docstring in Google's style."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    # The least indented lines begin an entry, the others go on with it.
    entries = re.split(r"^ {2,4}(?=\*{0,2}\w+:)", section.group(1), flags=re.MULTILINE)
    pairs = (entry.split(":", 1) for entry in entries if ":" in entry)
    return {name.strip(): " ".join(words.split()) for name, words in pairs}
