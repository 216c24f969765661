"""One line for what pydantic found wrong in a config: key, file, remedy.

The JSON schema that editors use says what a key should be. So a message and an editor never
disagree.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from optalr.experiments.configs.values import shown
from optalr.experiments.errors import ExperimentError, suggest

Schema = Mapping[str, Any]

_KINDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "object": "a section",
    "string": "text",
}


def one_line(error: ValidationError, schema: Schema, where: str) -> ExperimentError:
    """Return the first mistake of ``error`` as one line.

    Args:
      error: what pydantic raised.
      schema: the JSON schema of the config.
      where: what the message calls the config, such as the name of its file.
    """
    mistake = error.errors()[0]
    key = ".".join(map(str, mistake["loc"]))
    if mistake["type"] == "extra_forbidden":
        hint = suggest(key, _known_keys(schema))
        return ExperimentError(f"unknown key {key!r} in {where}: {hint}")
    expected = _expected(_at(schema, mistake["loc"]))
    return ExperimentError(f"{key} in {where} must be {expected}, got {shown(mistake['input'])}.")


def _known_keys(schema: Schema) -> list[str]:
    keys = []
    for name in schema["properties"]:
        keys += [name, *(f"{name}.{key}" for key in _at(schema, (name,)).get("properties", ()))]
    return keys


def _at(schema: Schema, location: tuple[str | int, ...]) -> Schema:
    """Return the part of ``schema`` that is about ``location``, a path of keys and list places."""
    node = schema
    for part in location:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node


def _expected(node: Schema) -> str:
    if "enum" in node:
        *others, last = node["enum"]
        return f"{', '.join(others)} or {last}"
    kind, low, high = _KINDS[node["type"]], node.get("minimum"), node.get("maximum")
    if low is None:
        return kind
    return f"{kind} of at least {low}" if high is None else f"{kind} between {low} and {high}"
