"""Noticing that a run is resumed with settings other than those it was saved with."""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from optalr.states import is_named_tuple


class ConfigurationChangedWarning(UserWarning):
    """A run continues with settings that differ from those it was saved with."""


def configuration(**settings: Any) -> dict[str, str]:
    """Describe settings as a flat dict of strings, to be saved beside a checkpoint.

    Choose it together with ``warn_if_changed``. An optimizer state consists of arrays and does not
    know the settings of the transformation that made it, so a decay that was changed by mistake
    restores without complaint.

    Args:
      **settings: numbers, strings, functions, sequences, mappings, dataclasses and arrays, nested
        as you like. Shapes, such as ``opt_state=jax.eval_shape(tx.init, params)``, are described by
        dtype and shape, arrays also by a digest of their values. A function is described by its
        name alone.

    Returns:
      A dict from the path of a setting, such as ``"optimizer.b1"``, to its description; it can be
      written as JSON.

    Cost: a digest of each array, on the host.

    Examples:
      >>> import optalr
      >>> optalr.configuration(optimizer={"name": "adam", "b1": 0.9}, seeds=[1, 2])
      {'optimizer.name': "'adam'", 'optimizer.b1': '0.9', 'seeds.0': '1', 'seeds.1': '2'}
    """
    return dict(_flatten("", settings))


def warn_if_changed(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Warn if two configurations differ, and name each setting that does.

    Choose it after a restore, before the run goes on.

    Args:
      saved: what ``configuration`` returned when the checkpoint was taken.
      current: what it returns now.

    Returns:
      One line per changed setting, with the old and the new value; empty if nothing changed.

    Warns:
      ConfigurationChangedWarning: something changed; the warning names it.

    Cost: a comparison of strings, on the host.

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


def _flatten(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the path and the description of each setting under ``value``."""
    if is_named_tuple(value):
        value = value._asdict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flatten(f"{path}.{key}" if path else str(key), child)
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            yield from _flatten(f"{path}.{i}", child)
    else:
        yield path, _describe(value)


def _describe(value: Any) -> str:
    """Return text that is the same whenever the setting is."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, jax.Array | np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:12]
        return f"{value.dtype}{list(value.shape)} {digest}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
