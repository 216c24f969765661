"""Configs to start from: one with every key explained, and some that optalr ships."""

import textwrap
from importlib import resources
from typing import Any

import tomlkit

from optalr.experiments.configs.config import Config, Section, to_table
from optalr.experiments.errors import ExperimentError, suggest

# Keys that nearly every config sets. The others stand there as comments.
_SHOWN = {"name", "purpose", "learning_rate", "epochs", "batch_size"}
_WIDTH = 96
_EXAMPLES = resources.files("optalr.experiments.examples")


def starter() -> str:
    """Return a config with every key, its meaning and its default."""
    table = to_table(Config())
    parts = [
        _comment(
            "Train with `optalr run` and this file. What is commented out has the value shown. "
            "`optalr list` shows what each name can be, and `optalr list NAME` its options, which "
            "are further keys of its section."
        )
    ]
    sections = {}
    for key, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            sections[key] = kind
        elif key != "tune":
            parts += [_comment(field.description or ""), _entry(key, table[key])]
    for key, kind in sections.items():
        parts += ["", _comment((kind.__doc__ or "").split("\n\n")[0]), f"[{key}]"]
        for name, field in kind.model_fields.items():
            parts += [_comment(field.description or ""), _entry(name, table[key][name])]
    tune = Config.model_fields["tune"].description or ""
    parts += ["", _comment(tune), "# [tune]", '# "method.learning_rate" = [0.1, 0.01, 0.001]']
    return "\n".join(parts) + "\n"


def example_names() -> list[str]:
    """Return the names of the configs that optalr ships."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in _EXAMPLES.iterdir()
        if entry.name.endswith(".toml")
    )


def read_example(name: str) -> str:
    """Return the text of a config that optalr ships.

    Raises:
      ExperimentError: it ships none of this name.
    """
    if name not in example_names():
        raise ExperimentError(f"no example {name!r}: {suggest(name, example_names())}")
    return (_EXAMPLES / f"{name}.toml").read_text(encoding="utf-8")


def _comment(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), _WIDTH, initial_indent="# ", subsequent_indent="# "
    )


def _entry(key: str, value: Any) -> str:
    line = tomlkit.dumps({key: value}).strip()
    return line if key in _SHOWN else f"# {line}"
