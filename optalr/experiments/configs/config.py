"""What a config can say: its sections, their keys, defaults and ranges.

A TOML file states its differences from these defaults and nothing else. A value takes three steps:
``files`` reads it, this module checks it, and ``methods``, ``rates``, the data's and the model's
builders turn it into objects.

The classes are pydantic models. So one line per key states its type, range, default and
description, both for the check here and for the JSON schema that editors read.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optalr.experiments.configs.mistakes import one_line
from optalr.experiments.configs.values import check_values
from optalr.experiments.errors import ExperimentError

# Random keys and NumPy's generators take 32 bits; larger seeds would be cut, or refused late.
_LARGEST_SEED = 2**32 - 1


class Section(BaseModel):
    """A part of a config with a fixed set of keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        # No conversions: text is not a number, and true is not 1.
        strict=True,
        use_attribute_docstrings=True,
    )


class OpenSection(Section):
    """A section that takes further keys: the arguments of what its ``name`` stands for.

    Those are checked where the name is looked up, against the signature of what it stands for.
    """

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


class DataConfig(OpenSection):
    """What to learn from. Further keys are arguments of the loader."""

    name: str = "digits"
    """A name of `optalr list`."""
    folder: str = ""
    """Where the files are; empty looks in $OPTALR_DATA, the system's folders and the cache."""
    download: bool = False
    """Fetch the files where no folder has them."""
    test_fraction: float = Field(default=0.2, ge=0, le=0.9)
    """Part held out for testing where the data has no test set of its own."""
    validation_fraction: float = Field(default=0.1, ge=0, le=0.9)
    """Part of the training examples held out for tuning and for switching."""
    split_seed: int = Field(default=0, ge=0, le=_LARGEST_SEED)
    """Decides which examples are held out."""
    limit: int = Field(default=0, ge=0)
    """Largest number of training examples; 0 takes all."""
    fraction: float = Field(default=1.0, ge=0, le=1)
    """Use this part of the training examples. It is taken before `limit`."""
    standardize: Literal["", "channel", "feature", "unit", "none"] = ""
    """How numbers are scaled: by the mean and deviation of a channel or a feature, to the unit
    interval (bytes are divided by 255), or not; empty leaves it to the data."""
    # TOML has lists only, which a strict tuple would refuse.
    augment: tuple[str, ...] = Field(default=(), strict=False)
    """Random changes of the training images: flip, shift, crop, zoom, rotate. A strength may
    follow a colon, as in rotate:15."""


class ModelConfig(OpenSection):
    """What to train. Further keys are arguments of the model."""

    name: str = "mlp"
    """A name of `optalr list`."""


class MethodConfig(OpenSection):
    """How to train. Further keys are arguments of the optimizer.

    A key that ends in _epochs sets the argument without that ending, in steps. A scale_by_* may
    have a section `length` with a `name` and its arguments: it multiplies the direction in place of
    the learning rate.
    """

    name: str = "sgd"
    """An optimizer of optalr or optax: tso_alra, sgd, adam, ... A scale_by_* is followed by a
    learning rate."""
    learning_rate: float = Field(default=1e-2, ge=0)
    """The rate, before the schedule."""


class ScheduleConfig(OpenSection):
    """How the learning rate changes. Further keys are arguments of the schedule."""

    name: str = "constant"
    """A name of `optalr list`."""


class PhaseConfig(OpenSection):
    """What moves the phase of a two-stage method. Further keys are arguments of the scheduler.

    A section `second` with a `name` and its arguments is the second stage of a method that has no
    phases of its own: adam, then sgd.
    """

    name: str = ""
    """A name of `optalr list`; empty leaves the phase to the method."""


class TrainConfig(Section):
    """The training loop."""

    epochs: int = Field(default=20, ge=1)
    """Passes over the training examples."""
    batch_size: int = Field(default=128, ge=1)
    """Examples per step. A last batch of an epoch that would not be full is left out."""
    seed: int = Field(default=0, ge=0, le=_LARGEST_SEED)
    """Decides initial parameters, order of the examples and dropout."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Lambda of the L2 penalty on kernels, added to the gradient."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Largest global norm of a gradient; 0 does not clip."""
    loop: Literal["auto", "scan", "step"] = "auto"
    """scan compiles an epoch; step compiles a step and streams batches; auto takes step for
    convolutions on a CPU (XLA runs their gradients some 20 times slower inside a scan) and for data
    larger than `resident_bytes`."""
    resident_bytes: int = Field(default=4_000_000_000, ge=0)
    """Training data larger than this is streamed."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs between evaluations."""


class MeshConfig(Section):
    """Several devices, of one process or of several."""

    data: int = Field(default=0, ge=0)
    """How many devices share each batch, and the roots of a method that takes any; 0 for one
    device, as if there were no others. Parameters are on every one of them, and states too, but
    for factors with `method.options.sharded_factors`."""


class RecordConfig(Section):
    """What is kept on disk."""

    checkpoint_every: int = Field(default=5, ge=1)
    """Epochs between checkpoints."""
    checkpoint_minutes: float = Field(default=10.0, ge=0)
    """A checkpoint is taken at least this often: within an epoch in a streamed loop, at its end in
    a scanned one."""
    keep: int = Field(default=2, ge=1)
    """How many of the latest checkpoints stay."""
    tensorboard: bool = False
    """Write TensorBoard events as well."""


class Config(Section):
    """One experiment."""

    purpose: str = ""
    """What question this config answers."""
    expected: str = ""
    """The metric to expect, and where it comes from."""
    cost: str = ""
    """Time and memory on a named machine."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    phase: PhaseConfig = PhaseConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    record: RecordConfig = RecordConfig()
    tune: dict[str, Any] = {}
    """The grid of `optalr tune`: a dotted key in quotes to a list of values."""


def from_table(table: Mapping[str, Any], where: str = "the config") -> Config:
    """Return the ``Config`` that a parsed TOML table describes.

    Args:
      table: nested dicts, as ``tomllib`` returns them.
      where: what a message calls the table, such as the name of its file.

    Raises:
      ExperimentError: an unknown key, or a value of the wrong kind or out of range.
    """
    check_values(table, where)
    try:
        config = Config.model_validate(table)
    except ValidationError as error:
        raise one_line(error, _json_schema(), where) from None
    if config.phase.options and not config.phase.name:
        key = next(iter(config.phase.options))
        raise ExperimentError(
            f"phase.{key} in {where} needs phase.name beside it, for example switch_at: without a "
            "name the section does nothing."
        )
    return config


@functools.cache
def _json_schema() -> dict[str, Any]:
    # Made once, since it takes longer than checking a config.
    return Config.model_json_schema()


def to_table(config: Config) -> dict[str, Any]:
    """Return the whole config, defaults included, as nested dicts that TOML can hold."""
    return config.model_dump(mode="python")


def own_keys(section: str) -> Collection[str]:
    """Return the keys that a section has whatever its ``name`` stands for."""
    field = Config.model_fields.get(section)
    model = field.annotation if field else None
    return model.model_fields if isinstance(model, type) and issubclass(model, Section) else ()


def schema(names: Mapping[str, Sequence[str]], others: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON schema of a config, for editors that check and complete TOML.

    Args:
      names: dotted key, such as ``data.name``, to the names that it can take.
      others: the keys among them that can take other names too.
    """
    made = Config.model_json_schema()
    for key, values in names.items():
        section, _, last = key.partition(".")
        definition = made["properties"][section]["$ref"].rsplit("/", 1)[-1]
        choice: dict[str, Any] = {"enum": list(values)}
        if key in others:
            choice = {"anyOf": [choice, {"type": "string"}]}
        made["$defs"][definition]["properties"][last] |= choice
    return made
