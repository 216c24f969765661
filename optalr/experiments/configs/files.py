"""Config files: TOML to a table and back, and overrides on the way in."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit

from optalr.experiments.configs.config import Config, from_table, to_table
from optalr.experiments.errors import ExperimentError, cause_of, suggest

# The longest config here has two thousand bytes.
_LARGEST_FILE = 1 << 20


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a TOML file and apply ``key=value`` overrides, or raise with the remedy.

    Args:
      path: the file.
      overrides: texts such as ``train.epochs=5``; the value is read as TOML, else as text.

    Raises:
      ExperimentError: no such file, bad TOML, an unknown key, a value of the wrong kind.
    """
    path = Path(path)
    if path.is_dir():
        raise ExperimentError(f"{path} is a folder: name a .toml file, or use `optalr compare`.")
    if not path.is_file():
        raise ExperimentError(f"no config file {path}: {_neighbours(path)}")
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ExperimentError(f"{path} is larger than any config: is it the right file?")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad TOML, bad UTF-8, endless digits or brackets
        raise ExperimentError(f"{path} is not valid TOML: {error}. Mend that line.") from None
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {cause_of(error)}.") from None
    for text in overrides:
        _set(table, *_parse_override(text))
    return from_table(table, str(path))


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """Return ``config`` with dotted keys such as ``method.learning_rate`` set to new values.

    Raises:
      ExperimentError: an unknown key, a value of the wrong kind.
    """
    table = to_table(config)
    for key, value in values.items():
        _set(table, key.split("."), value)
    return from_table(table, "the overrides")


def to_toml(table: Mapping[str, Any]) -> str:
    """Return nested dicts as TOML text."""
    return tomlkit.dumps(table)


def _neighbours(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    found = [str(p) for p in sorted(folder.rglob("*.toml"))] if folder.is_dir() else []
    return suggest(str(path), found) if found else f"there are no .toml files in {folder}."


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ExperimentError(f"--set takes section.key=value, got {text!r}.")
    if any(character < " " and character != "\t" for character in text):
        raise ExperimentError(f"--set takes one line, got {text!r}: give each key its own --set.")
    try:
        return _path(key), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        # So text needs no quotes, which the shell would remove.
        return _path(key), value.strip()
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"--set {text[:60]!r}: {error}.") from None


def _path(key: str) -> list[str]:
    """Return the parts of a dotted key, some of which may stand in quotes."""
    try:
        table = tomllib.loads(f"{key} = 0")
    except (ValueError, RecursionError):
        raise ExperimentError(f"--set takes section.key=value, and {key!r} is no key.") from None
    parts = []
    while isinstance(table, dict):
        ((part, table),) = table.items()
        parts.append(part)
    return parts


def _set(table: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *sections, last = path
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            key = ".".join(path)
            raise ExperimentError(f"{key}: {section} is a value, not a section; write section.key.")
    table[last] = value
