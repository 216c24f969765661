"""From the words of a command line to what they ask for; mistakes and warnings are one line."""

import contextlib
import functools
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tyro

from optalr.experiments.errors import ExperimentError, suggest, warnings_log

# With these, tyro prints a page on standard output and ends the program.
_HELP = ("-h", "--help")
# What tyro draws around its messages.
_SIDES, _EDGES = "│| ", "─╭╮╰╯-+ "


def parse(
    commands: Mapping[str, Callable[..., None]],
    words: Sequence[str],
    *,
    prog: str,
    description: str,
) -> Callable[[], None]:
    """Return the command that ``words`` ask for, with its arguments.

    Args:
      commands: name to function.
      words: the command line, without the program's name.
      prog: the program's name.
      description: the first line of its help.

    Raises:
      ExperimentError: there is no such command or option, or a value is of the wrong kind.
    """
    if not words:
        raise ExperimentError(f"name a command: {', '.join(commands)}; `{prog} --help` says more.")
    if not words[0].startswith("-") and words[0] not in commands:
        raise ExperimentError(f"no command {words[0]!r}: {suggest(words[0], commands)}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                {name: _later(command) for name, command in commands.items()},
                prog=prog,
                description=description,
                args=list(words),
            )
    except SystemExit as error:
        if not error.code or set(words) & set(_HELP):
            raise
        command = words[0] if words[0] in commands else "COMMAND"
        raise ExperimentError(
            f"{_one_line(complaint.getvalue())}; `{prog} {command} --help` lists its options."
        ) from None


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Return a function with the same arguments that returns the call instead of making it."""

    @functools.wraps(command)
    def later(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    later.__annotations__ = {**command.__annotations__, "return": Callable[[], None]}
    return later


def _one_line(box: str) -> str:
    """Return the first paragraph in a box, whose first line is a title."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip(_SIDES)
        # A line that is all frame, or empty, stands before the paragraph or ends it.
        if set(text) <= set(_EDGES) or text.startswith("Got errors"):
            if words:
                break
            continue
        words.append(text)
    return " ".join(words).rstrip(".") or "the command line cannot be read"


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print a warning as one line, without the place in the code, and each only once."""
    shown: set[str] = set()

    class Once(logging.StreamHandler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if text not in shown:
                shown.add(text)
                print(f"optalr: warning: {text}", file=sys.stderr)

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        warnings_log.warning("%s", message)

    handler = Once()
    warnings_log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        warnings_log.removeHandler(handler)
