"""Noticing that a run is resumed with other settings than it was saved with."""

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optalr.states import is_named_tuple


class ConfigurationChangedWarning(UserWarning):
    """A run goes on with settings that differ from those it was saved with."""


def configuration(**settings: Any) -> dict[str, str]:
    """Describe settings as a flat dict of strings, to be saved beside a checkpoint.

    Choose it with ``warn_if_changed``: an optimizer state is arrays only and does not know the
    settings of the transformation that made it, and a decay that was changed by mistake restores
    without complaint.

    Args:
      **settings: numbers, strings, functions, sequences, mappings, dataclasses and arrays, nested
        at will. Shapes, such as ``opt_state=jax.eval_shape(tx.init, params)``, are described as
        such, arrays by a digest of their values. A function is known by its name alone.

    Returns:
      A dict from the way to a setting, such as ``"optimizer.b1"``, to its description; it can be
      written as JSON.

    Examples:
      >>> import optalr
      >>> optalr.configuration(optimizer={"name": "adam", "b1": 0.9}, seeds=[1, 2])
      {'optimizer.name': "'adam'", 'optimizer.b1': '0.9', 'seeds.0': '1', 'seeds.1': '2'}
    """
    return dict(_flatten("", settings))


def warn_if_changed(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Warn where two configurations differ, and name each setting that does.

    Args:
      saved: what ``configuration`` returned when the checkpoint was taken.
      current: what it returns now.

    Returns:
      One line a changed setting, with the old and the new value; empty where nothing changed.

    Warns:
      ConfigurationChangedWarning: naming what changed.

    Examples:
      >>> import warnings, optalr
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     lines = optalr.warn_if_changed(
      ...         optalr.configuration(rate=0.1, b1=0.9), optalr.configuration(rate=0.2, b1=0.9)
      ...     )
      >>> lines, len(caught)
      (['rate: 0.1 -> 0.2'], 1)
    """
    absent = "(absent)"
    changes = [
        f"{name}: {saved.get(name, absent)} -> {current.get(name, absent)}"
        for name in [*saved, *(name for name in current if name not in saved)]
        if saved.get(name) != current.get(name)
    ]
    if changes:
        warnings.warn(
            "The run is resumed with a changed configuration: " + "; ".join(changes),
            ConfigurationChangedWarning,
            stacklevel=2,
        )
    return changes


def _flatten(way: str, value: Any):
    if is_named_tuple(value):
        value = value._asdict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flatten(f"{way}.{key}" if way else str(key), child)
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            yield from _flatten(f"{way}.{i}", child)
    else:
        yield way, _describe(value)


def _describe(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, jax.Array | np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:12]
        return f"{value.dtype}{list(value.shape)} {digest}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
