"""Every config in the repository can be read, says what it is for, and fits its data."""

import tomllib
from pathlib import Path

import pytest

from optalr.experiments.configs.config import Config, to_table
from optalr.experiments.configs.files import load_config
from optalr.experiments.configs.methods import build_method
from optalr.experiments.studies.tune import grid

FOLDER = Path(__file__).parents[3] / "configs"
EXAMPLES = FOLDER.parent / "optalr" / "experiments" / "examples"
FILES = sorted(FOLDER.rglob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_config_states_purpose_expectation_and_cost(path):
    config = load_config(path)
    assert config.purpose
    assert config.expected
    assert config.cost
    if config.tune:
        grid(config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_config_states_differences_only(path):
    defaults = to_table(Config())
    for section, values in tomllib.loads(path.read_text()).items():
        if isinstance(values, dict) and section != "tune":
            repeated = [
                key
                for key, value in values.items()
                if key != "name" and defaults[section].get(key, object()) == value
            ]
            assert not repeated, f"[{section}] repeats defaults: {repeated}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_method_of_a_config_can_be_built(path):
    config = load_config(path)
    given: dict[str, object] = {"num_classes": 10}
    if config.data.name not in ("boston", "diabetes"):
        given["loss"] = "softmax_cross_entropy"
    total = 10 * config.train.epochs
    assert build_method(config, steps_per_epoch=10, total_steps=total, given=given)


def test_the_wheel_ships_the_configs_of_the_digits():
    shipped = {path.name: path.read_text() for path in EXAMPLES.glob("*.toml")}
    assert shipped == {path.name: path.read_text() for path in (FOLDER / "digits").glob("*.toml")}
