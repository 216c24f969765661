"""Options that a user gives by name, as an object, or as a mapping of its fields."""

from collections.abc import Mapping
from typing import Any

from optalr.arguments import from_fields


def resolve_preset(name: str, given: Any, presets: Mapping[str | None, Any]) -> Any:
    """Return the options that ``given`` stands for.

    Args:
      name: the argument, as the user wrote it.
      given: a key of ``presets``, an object of their kind, or a mapping of its fields.
      presets: options by name, all of one kind.

    Raises:
      TypeError: ``given`` is none of these, or the mapping names an unknown field.
    """
    kind = type(next(iter(presets.values())))
    # Only these can be keys; an object may hold arrays, which cannot be looked up.
    if (given is None or isinstance(given, str)) and given in presets:
        return presets[given]
    options = from_fields(name, given, kind)
    if not isinstance(options, kind):
        listed = ", ".join(repr(preset) for preset in presets if preset is not None)
        raise TypeError(
            f"{name} must be {listed}, a {kind.__name__} or a mapping of its fields, got {given!r}."
        )
    return options
