"""Lines of a JSONL file that show what was changed, lost or added since they were written.

A line carries its number, the run that it belongs to and a checksum of all of its text, as in

    {"loss": 2.63, "step": 1, "row": 1, "run": "5b41ff07", "check": "c28d7a11"}

Lines without them, of earlier versions, are read as they are.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# What a line carries about itself, which is not part of what was measured.
_OWN = ("row", "run", "check")
_CHECK = ', "check": "'
# Of a line that ends in `, "check": "c28d7a11"}`.
_TAIL = len(_CHECK) + 8 + len('"}')


class Line(NamedTuple):
    """An intact line.

    Attributes:
      row: what was measured.
      text: the line, as it stands in the file.
      number: its place, from 1 on; 0 where it has none.
      run: the run that wrote it, empty where it does not say.
    """

    row: dict[str, Any]
    text: str
    number: int
    run: str


class Lines(NamedTuple):
    """What a file holds.

    Attributes:
      intact: its intact lines, in their order.
      problems: what is wrong with the file, a phrase each.
    """

    intact: list[Line]
    problems: list[str]


class Standing:
    """How far a JSONL file has come.

    Attributes:
      last: the number of its last row.
    """

    def __init__(self) -> None:
        self.last = 0
        self._rows = 0
        self._total = hashlib.sha256()

    @classmethod
    def of(cls, lines: Sequence[Line]) -> "Standing":
        """Return the standing of a file that holds these lines."""
        made = cls()
        made.add([line.text for line in lines])
        made.last = lines[-1].number if lines else 0
        return made

    def add(self, texts: Sequence[str]) -> None:
        """Count lines that were written."""
        self._rows += len(texts)
        self.last += len(texts)
        self._total.update("".join(text + "\n" for text in texts).encode())

    def note(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"rows": self._rows, "last": self.last, "sha256": self._total.hexdigest()}


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON in which a number that is not finite is null, because JSON has no NaN."""

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(key): clean(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [clean(entry) for entry in item]
        if isinstance(item, float) and not math.isfinite(item):
            return None
        return item

    # Nearly all rows are finite; cleaning each would take longer than writing it.
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(clean(value), indent=indent)


def to_lines(rows: Iterable[Mapping[str, Any]], *, after: int, run: str) -> list[str]:
    """Return one line of text a row, numbered from ``after + 1`` on, for the run ``run``."""
    lines = []
    for number, row in enumerate(rows, after + 1):
        start = to_json({**row, "row": number, "run": run})[:-1]
        lines.append(f'{start}{_CHECK}{_check(start)}"}}')
    return lines


def read_lines(content: bytes) -> Lines:
    """Return the intact lines of a file and what is wrong with it.

    The last line counts as unwritten where it lacks its end: an interruption cuts it short.
    """
    intact, damaged = [], []
    *whole, _ = content.split(b"\n")
    for place, raw in enumerate(whole, 1):
        line = _read_line(raw)
        if line is None:
            damaged.append(place)
        else:
            intact.append(line)
    problems = [f"line {place} is damaged" for place in damaged[:3]]
    if len(damaged) > len(problems):
        problems.append(f"so are {len(damaged) - len(problems)} more")
    return Lines(intact, problems + _gaps(intact))


def _read_line(raw: bytes) -> Line | None:
    try:
        text = raw.decode()
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    # A line of this version that lost one of the three is damaged, not old.
    if any(name in found for name in _OWN):
        start, tail = text[:-_TAIL], text[-_TAIL:]
        if tail != f'{_CHECK}{_check(start)}"}}' or not isinstance(found.get("row"), int):
            return None
    row = {k: math.nan if v is None else v for k, v in found.items() if k not in _OWN}
    return Line(row, text, found.get("row", 0), str(found.get("run", "")))


def _gaps(lines: list[Line]) -> list[str]:
    """Return where the numbers skip or go back, and which lines another run wrote."""
    problems, expected = [], 1
    for line in lines:
        if line.number and line.number > expected:
            last = line.number - 1
            missing = f"row {last}" if last == expected else f"rows {expected} to {last}"
            problems.append(f"{missing} missing")
        elif line.number and line.number < expected:
            problems.append(f"row {line.number} stands after row {expected - 1}")
        expected = line.number + 1
    foreign = sum(line.run != lines[-1].run for line in lines)
    if foreign:
        problems.append(f"{foreign} rows are of another run")
    return problems


def _check(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
