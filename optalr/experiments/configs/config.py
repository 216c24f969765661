"""Configs: TOML files that state differences from the defaults below, and nothing else.

A section with a ``name`` (data, model, method, schedule, phase) takes further keys, which are the
arguments of what the name stands for; they are checked where it is built.
"""

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optalr.experiments.errors import ExperimentError, suggest


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    Attributes:
      name: a name of ``optalr list``.
      folder: where the files are; empty looks in ``$OPTALR_DATA``, the system and the cache.
      download: whether to fetch the files where no folder has them.
      test_fraction: held out where the data has no test set of its own.
      validation_fraction: of the training examples, held out for tuning and for switching.
      split_seed: which examples are held out.
      limit: use at most so many training examples; 0 is all.
      fraction: use this part of the training examples, before ``limit``.
      augment: random changes of the training images: ``flip``, ``shift``, ``crop``, ``zoom``,
        ``rotate``, each with its strength if wanted (``rotate:15``).
      options: arguments of the loader.
    """

    name: str = "digits"
    folder: str = ""
    download: bool = False
    test_fraction: float = 0.2
    validation_fraction: float = 0.1
    split_seed: int = 0
    limit: int = 0
    fraction: float = 1.0
    augment: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What to train: a name of ``optalr list`` and its arguments."""

    name: str = "mlp"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """How to train: an optimizer of optalr or optax and its arguments.

    Attributes:
      name: ``tso_alra``, ``sgd``, ``adam``, ... A ``scale_by_*`` is given a learning rate.
      learning_rate: the rate, before the schedule.
      options: further arguments; one that ends in ``_epochs`` is given to the argument without
        that ending, in steps. A ``scale_by_*`` may have a section ``length``, with a ``name`` and
        its arguments: what multiplies its direction instead of the learning rate.
    """

    name: str = "sgd"
    learning_rate: float = 1e-2
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes: a name of ``optalr list`` and its arguments."""

    name: str = "constant"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """What moves the phase of a two-stage method; an empty name leaves it to the method."""

    name: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      epochs: passes over the training examples.
      batch_size: examples a step; the rest of an epoch that does not fill a batch is left out.
      seed: initial parameters, order of the examples, dropout.
      weight_decay: lambda of the L2 penalty on kernels, added to the gradient.
      clip_norm: largest global norm of a gradient; 0 does not clip.
      loop: ``scan`` compiles an epoch, ``step`` compiles a step and streams batches, ``auto`` takes
        ``step`` for convolutions on a CPU (XLA runs their gradients some 20 times slower inside a
        scan) and for data above ``resident_bytes``.
      resident_bytes: training data larger than this is streamed.
      evaluate_every: epochs between evaluations.
    """

    epochs: int = 20
    batch_size: int = 128
    seed: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    loop: str = "auto"
    resident_bytes: int = 4_000_000_000
    evaluate_every: int = 1


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """What is kept on disk.

    Attributes:
      checkpoint_every: epochs between checkpoints.
      checkpoint_minutes: a checkpoint is taken at least this often, even within an epoch (streamed
        loops) or at its end (scanned ones).
      keep: how many of the latest checkpoints stay.
      tensorboard: whether to write TensorBoard events as well.
    """

    checkpoint_every: int = 5
    checkpoint_minutes: float = 10.0
    keep: int = 2
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment.

    Attributes:
      purpose: what question this config answers.
      expected: the metric to expect, and where it comes from.
      cost: time and memory on a named machine.
      data: what to learn from.
      model: what to train.
      method: how to train.
      schedule: how the learning rate changes.
      phase: what moves the phase.
      train: the loop.
      record: what is kept.
      tune: the grid of ``optalr tune``: dotted key to list of values.
    """

    purpose: str = ""
    expected: str = ""
    cost: str = ""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    method: MethodConfig = dataclasses.field(default_factory=MethodConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    phase: PhaseConfig = dataclasses.field(default_factory=PhaseConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    record: RecordConfig = dataclasses.field(default_factory=RecordConfig)
    tune: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a TOML file and apply ``key=value`` overrides, or raise with the remedy.

    Args:
      path: the file.
      overrides: ``train.epochs=5``-like strings; the value is read as TOML, else as text.

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
    for override in overrides:
        _apply_override(table, override)
    return from_table(table, str(path))


def from_table(table: Mapping[str, Any], where: str = "the config") -> Config:
    """Return the ``Config`` that a parsed TOML table describes."""
    config = _fill(Config, table, "", where)
    _check(config, where)
    return config


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """Return ``config`` with dotted keys such as ``method.learning_rate`` set to new values."""
    table = to_table(config)
    for key, value in values.items():
        _set(table, key, value)
    return from_table(table, "the overrides")


def to_table(config: Config) -> dict[str, Any]:
    """Return the whole config, defaults included, as nested dicts that TOML can hold."""

    def convert(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            table = {
                field.name: convert(getattr(value, field.name))
                for field in dataclasses.fields(value)
                if field.name != "options"
            }
            return table | convert(getattr(value, "options", {}))
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return convert(config)


def to_toml(table: Mapping[str, Any]) -> str:
    """Return nested dicts as TOML text."""
    lines: list[str] = []

    def write(part: Mapping[str, Any], prefix: str) -> None:
        for key, value in part.items():
            if not isinstance(value, Mapping):
                lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
        for key, value in part.items():
            if isinstance(value, Mapping):
                name = f"{prefix}{_toml_key(key)}"
                lines.extend(["", f"[{name}]"])
                write(value, name + ".")

    write(table, "")
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _neighbours(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    found = [str(p) for p in sorted(folder.rglob("*.toml"))] if folder.is_dir() else []
    return suggest(str(path), found) if found else f"there are no .toml files in {folder}."


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"{key}: {section} is a value, not a section; write section.key.")
    table[last] = value


def _apply_override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ExperimentError(f"--set takes section.key=value, got {text!r}.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    _set(table, key.strip(), parsed)


def _fill(cls: type, table: Any, prefix: str, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise ExperimentError(f"{prefix[:-1]} in {where} must be a section, got {table!r}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    open_ended = fields.pop("options", None) is not None
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            if not open_ended:
                hint = suggest(prefix + key, _all_keys())
                raise ExperimentError(f"unknown key {prefix + key!r} in {where}: {hint}")
            options[key] = value
        elif dataclasses.is_dataclass(fields[key]):
            values[key] = _fill(typing.cast(type, fields[key]), value, f"{prefix}{key}.", where)
        else:
            values[key] = _typed(fields[key], value, prefix + key, where)
    if open_ended:
        values["options"] = options
    return cls(**values)


def _typed(kind: Any, value: Any, key: str, where: str) -> Any:
    """Return ``value`` as ``kind``, or raise naming the key."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if typing.get_origin(kind) is Mapping and isinstance(value, Mapping):
        return dict(value)
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if kind in plain and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    expected = plain.get(kind, "a list" if typing.get_origin(kind) is tuple else "a section")
    raise ExperimentError(f"{key} in {where} must be {expected}, got {value!r}.")


def _all_keys() -> list[str]:
    keys = []
    for name, kind in typing.get_type_hints(Config).items():
        keys.append(name)
        if dataclasses.is_dataclass(kind):
            keys += [f"{name}.{field.name}" for field in dataclasses.fields(kind)]
    return [key for key in keys if not key.endswith(".options")]


def _check(config: Config, where: str) -> None:
    """Raise where a number lies outside its range."""
    ranges = [
        ("train.epochs", config.train.epochs, 1, None),
        ("train.batch_size", config.train.batch_size, 1, None),
        ("train.seed", config.train.seed, 0, None),
        ("train.weight_decay", config.train.weight_decay, 0, None),
        ("train.clip_norm", config.train.clip_norm, 0, None),
        ("train.evaluate_every", config.train.evaluate_every, 1, None),
        ("record.checkpoint_every", config.record.checkpoint_every, 1, None),
        ("record.keep", config.record.keep, 1, None),
        ("data.limit", config.data.limit, 0, None),
        ("data.fraction", config.data.fraction, 0, 1),
        ("data.split_seed", config.data.split_seed, 0, None),
        ("data.test_fraction", config.data.test_fraction, 0, 0.9),
        ("data.validation_fraction", config.data.validation_fraction, 0, 0.9),
        ("method.learning_rate", config.method.learning_rate, 0, None),
    ]
    for key, value, low, high in ranges:
        if not value >= low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ExperimentError(f"{key} in {where} must be {limit}, got {value!r}.")
    if config.train.loop not in ("auto", "scan", "step"):
        raise ExperimentError(
            f"train.loop in {where} must be auto, scan or step, got {config.train.loop!r}."
        )
