"""Passing a config section's keys to the function that its ``name`` stands for."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from optalr.experiments.errors import ExperimentError, suggest


def accepted(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the named parameters of ``function``."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind in kinds}


def check_options(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    section: str,
    given: tuple[str, ...] = (),
) -> None:
    """Raise where ``options`` has a key that ``function`` does not take or lacks one it needs.

    Args:
      function: what the section's name stands for.
      options: the section's keys.
      section: its name, for the message.
      given: parameters that the caller supplies itself; they are not keys of the config.
    """
    parameters = {n: p for n, p in accepted(function).items() if n not in given}
    for key in options:
        if key not in parameters:
            hint = suggest(f"{section}.{key}", [f"{section}.{name}" for name in parameters])
            if not parameters:
                hint = "it takes none."
            raise ExperimentError(f"unknown key '{section}.{key}' for {_name(function)}: {hint}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ExperimentError(
                f"{_name(function)} needs '{section}.{name}': add it to the config."
            )


def call(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    section: str,
    **given: Any,
) -> Any:
    """Call ``function`` with a section's keys, lists as tuples, errors as one line.

    Args:
      function: what the section's name stands for.
      options: the section's keys.
      section: its name, for the message.
      **given: arguments that do not come from the config; those it does not take are left out.
    """
    taken = {key: value for key, value in given.items() if key in accepted(function)}
    check_options(function, options, section=section, given=tuple(taken))
    arguments = {key: _frozen(value) for key, value in options.items()}
    try:
        return function(**taken, **arguments)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{section} {_name(function)}: {error}") from error


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))
