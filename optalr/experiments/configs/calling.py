"""From a section of a config to an object: `name` names a function, other keys are arguments.

Every object that a config names is made here, so that a misspelt name or key reads the same
wherever it stands.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from optalr.experiments.configs.config import own_keys
from optalr.experiments.configs.values import shown
from optalr.experiments.errors import ExperimentError, suggest

T = TypeVar("T")
# What options of a user's raise, deep in what they are handed to.
USER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
# Annotations of options, which are checked before the function is called.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
CountOrNone = Annotated[int, Field(ge=0, le=1_000_000)]
Depth = Annotated[int, Field(ge=1, le=1000)]
Part = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


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
    # The given arguments are no keys of the config, so no message may suggest one that the section
    # does not have of its own.
    keys = {key: parameter for key, parameter in parameters.items() if key not in taken}
    for key in options:
        if key not in keys:
            known = {*keys, *own_keys(section)} - {"name"}
            hint = suggest(f"{section}.{key}", [f"{section}.{valid}" for valid in known])
            hint = hint if known else "it takes none."
            raise ExperimentError(f"unknown key '{section}.{key}' for {name}: {hint}")
    for key, parameter in keys.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise ExperimentError(f"{name} needs '{section}.{key}': add it to the config.")
        # Whatever else an argument takes: what is a number by default is no text and no list.
        if key in options and _is_number(parameter.default) and not _is_number(options[key]):
            raise ExperimentError(
                f"{section}.{key} must be a number, got {shown(options[key])}; {name} has "
                f"{parameter.default} by default."
            )
    frozen = {key: _frozen(value) for key, value in options.items()}
    _check_types(function, frozen, section)
    try:
        return function(**taken, **frozen)
    except USER_ERRORS as error:
        raise ExperimentError(f"{section} {name}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return what an exception says, and its kind where that is not plain from the words."""
    if isinstance(error, (TypeError, ValueError, NotImplementedError)) and str(error):
        return str(error)
    return f"{type(error).__name__} {error}"


def _check_types(function: Callable[..., Any], options: Mapping[str, Any], section: str) -> None:
    """Raise where an option is not what a function of this room says that it takes.

    Other packages annotate their functions for readers, not for a check.
    """
    if not function.__module__.startswith("optalr.experiments."):
        return
    hints = get_type_hints(function, include_extras=True)
    for key, value in options.items():
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            mistake = error.errors()[0]
            place = ".".join(map(str, (section, key, *mistake["loc"])))
            # TOML calls a list what Python calls a tuple here.
            told = mistake["msg"].replace("a valid tuple", "a list")
            told = told.replace("Input should be", "must be", 1)
            raise ExperimentError(f"{place} {told}, got {shown(mistake['input'])}.") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _frozen(value: Any) -> Any:
    """Return lists as tuples: jax wants static arguments that can be hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
