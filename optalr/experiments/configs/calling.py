"""From a section of a config to an object: `name` names a function, other keys are arguments.

Every object that a config names is made here, so that a misspelt name or key reads the same
wherever it stands.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from optalr.experiments.errors import ExperimentError, suggest

T = TypeVar("T")


def choose(choices: Mapping[str, T], name: str, *, key: str) -> T:
    """Return what ``name`` stands for.

    Args:
      choices: name to what it stands for.
      name: what the config says.
      key: where it says so, such as ``model.name``.

    Raises:
      ExperimentError: no such name.
    """
    if name not in choices:
        raise ExperimentError(f"unknown {key} {name!r}: {suggest(name, choices)}")
    return choices[name]


def accepted(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of ``function`` that can be given by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind in kinds}


def call(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    section: str,
    **given: Any,
) -> Any:
    """Call ``function`` with a section's keys; turn lists into tuples and errors into one line.

    Args:
      function: what the section's name stands for.
      options: the section's keys.
      section: its name, for the message.
      **given: arguments that do not come from the config; those it does not take are left out.

    Raises:
      ExperimentError: a key that ``function`` does not take, one missing that it needs, or a value
        that it refuses.
    """
    parameters = accepted(function)
    taken = {key: value for key, value in given.items() if key in parameters}
    name = getattr(function, "__name__", str(function))
    # The given arguments are no keys of the config, so no message may suggest one.
    keys = {key: parameter for key, parameter in parameters.items() if key not in taken}
    for key in options:
        if key not in keys:
            hint = suggest(f"{section}.{key}", [f"{section}.{valid}" for valid in keys])
            hint = hint if keys else "it takes none."
            raise ExperimentError(f"unknown key '{section}.{key}' for {name}: {hint}")
    for key, parameter in keys.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise ExperimentError(f"{name} needs '{section}.{key}': add it to the config.")
    try:
        return function(**taken, **{key: _frozen(value) for key, value in options.items()})
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{section} {name}: {error}") from error


def _frozen(value: Any) -> Any:
    """Return lists as tuples: jax wants static arguments that can be hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
