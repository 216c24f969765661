"""Config files: TOML to a table and back, and overrides on the way in."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optalr.experiments.configs.config import Config, from_table, to_table
from optalr.experiments.errors import ExperimentError, suggest


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
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path} is not valid TOML: {error}. Mend that line.") from None
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
        _set(table, key, value)
    return from_table(table, "the overrides")


def to_toml(table: Mapping[str, Any]) -> str:
    """Return nested dicts as TOML text."""
    return "\n".join(_lines(table, "")) + "\n"


def _lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    # Values come before sections: TOML counts whatever follows a section's header to it.
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in values.items()]
    for key, section in table.items():
        if isinstance(section, Mapping):
            name = f"{prefix}{_toml_key(key)}"
            lines += ["", f"[{name}]", *_lines(section, name + ".")]
    return lines


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _neighbours(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    found = [str(p) for p in sorted(folder.rglob("*.toml"))] if folder.is_dir() else []
    return suggest(str(path), found) if found else f"there are no .toml files in {folder}."


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ExperimentError(f"--set takes section.key=value, got {text!r}.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        # So text needs no quotes, which the shell would remove.
        return key.strip(), value.strip()


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"{key}: {section} is a value, not a section; write section.key.")
    table[last] = value
