"""What holds for every value of a config, wherever it stands.

TOML can say more than a run can use: infinities, whole numbers of thousands of digits, lists a
thousand deep. One walk over the table refuses these and names the key.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optalr.experiments.errors import ExperimentError

# Sections in sections, lists in lists: configs need three or four.
_DEEPEST = 16
# What TOML promises of whole numbers.
_LARGEST = 2**63 - 1
# Of float32, in which runs compute: what is larger becomes infinite there.
_LARGEST_FLOAT = (2 - 2**-23) * 2.0**127
# Of a value in a message.
_SHOWN = 60


def check_values(table: Mapping[str, Any], where: str) -> None:
    """Raise if a value of a table can be no setting, whatever its key.

    Args:
      table: nested dicts, as ``tomllib`` returns them.
      where: what a message calls the table, such as the name of its file.

    Raises:
      ExperimentError: a number is not finite or too large, a text cannot be written as UTF-8, or
        the table is too deep.
    """
    # A walk without recursion, since depth is one of the things to find.
    places: list[Iterator[tuple[str, Any]]] = [_children("", table)]
    while places:
        found = next(places[-1], None)
        if found is None:
            places.pop()
            continue
        key, value = found
        problem = _problem(value)
        if problem:
            raise ExperimentError(f"{key} in {where} must be {problem}, got {shown(value)}.")
        if isinstance(value, (Mapping, list, tuple)):
            if len(places) == _DEEPEST:
                raise ExperimentError(f"{key[:_SHOWN]} in {where} is nested too deep.")
            places.append(_children(f"{key}.", value))


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    # Python refuses to print whole numbers of thousands of digits.
    if isinstance(value, int) and abs(value) > _LARGEST:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _children(prefix: str, value: Mapping[str, Any] | Sequence[Any]) -> Iterator[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    return ((f"{prefix}{key}", child) for key, child in pairs)


def _problem(value: Any) -> str:
    """Return what a value should be, where it is not that; else nothing."""
    # NaN is in no interval.
    if isinstance(value, float) and not -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT:
        return "a finite number of 32 bits"
    if isinstance(value, int) and abs(value) > _LARGEST:
        return "a whole number of at most 64 bits"
    if isinstance(value, str) and not _can_be_written(value):
        return "text that UTF-8 can hold"
    return ""


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
