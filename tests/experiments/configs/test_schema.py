"""The JSON schema that editors use says what the check says."""

import json
import tomllib

import jsonschema
import pytest

from optalr.experiments import cli
from optalr.experiments.configs.config import from_table
from optalr.experiments.errors import ExperimentError
from tests.experiments.configs.test_repository import FILES, FOLDER

SHIPPED = json.loads((FOLDER / "schema.json").read_text())


def test_the_shipped_schema_is_what_the_command_prints(capsys):
    cli.main(["schema"])
    assert json.loads(capsys.readouterr().out) == SHIPPED


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_config_fits_the_schema(path):
    validator = jsonschema.validators.validator_for(SHIPPED)(SHIPPED)
    assert not [error.message for error in validator.iter_errors(tomllib.loads(path.read_text()))]


@pytest.mark.parametrize(
    "text",
    [
        "[train]\nepoch = 3",
        "[train]\nepochs = 0",
        "[train]\nepochs = '3'",
        "[train]\nloop = 'fast'",
        "[data]\ntest_fraction = 1",
        "[data]\naugment = 'flip'",
        "tune = 3",
    ],
)
def test_what_the_check_refuses_does_not_fit_the_schema(text):
    table = tomllib.loads(text)
    with pytest.raises(ExperimentError):
        from_table(table)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(table, SHIPPED)


def test_names_are_part_of_the_schema():
    jsonschema.validate({"method": {"name": "scale_by_adam"}}, SHIPPED)
    with pytest.raises(jsonschema.ValidationError, match="digts"):
        jsonschema.validate({"data": {"name": "digts"}}, SHIPPED)


def test_every_key_has_a_description():
    for definition in SHIPPED["$defs"].values():
        for key, node in definition["properties"].items():
            assert node.get("description"), key
