"""Values of every kind at every key: a config is refused in one line, or written and read again."""

import datetime
import inspect
import itertools
import tomllib

import numpy as np
import pytest

from optalr.experiments.configs.calling import accepted
from optalr.experiments.configs.config import Config, Section, from_table, to_table
from optalr.experiments.configs.files import load_config, to_toml
from optalr.experiments.configs.rates import SCHEDULES
from optalr.experiments.data import load
from optalr.experiments.errors import ExperimentError
from optalr.experiments.models import MODELS
from optalr.experiments.training.trainer import Trainer


def _deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


VALUES = [
    True, 0, 1, 3, -5, 2**31, 2**32, 2**63, 10**400,
    0.0, 0.5, -1.0, 1e308, float("nan"), float("inf"), float("-inf"),
    "", "adam", "two\nlines", "\x00\x07\x7f", "naïve \u2028 ☃ 'quoted' \"twice\"", "\ud800",
    [], [1], [0], [-3, 0.5], ["flip"], [[1], [2]], [{"a": 1}, {"b": [2]}],
    {}, {"ké y": 1}, {"a": {"b": datetime.date(2026, 2, 3)}}, _deep(12), _deep(500),
    datetime.date(2026, 2, 3), datetime.time(3, 4, 5), datetime.datetime(2026, 2, 3, 4, 5),
]  # fmt: skip
SECTIONS = [
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
]
KEYS = [
    *itertools.product(
        SECTIONS, ["naïve key", "a.b", 'quo"te', "new\nline", "extra", "options", "weight_decay"]
    ),
    *(
        (name, key)
        for name in SECTIONS
        for key in Config.model_fields[name].annotation.model_fields
    ),
    *((name, None) for name in Config.model_fields),
]


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_config_is_refused_in_one_line_or_written_and_read_again(tmp_path, stride):
    path, read = tmp_path / "config.toml", 0
    for (name, key), value in list(itertools.product(KEYS, VALUES))[::stride]:
        try:
            config = from_table({name: value if key is None else {key: value}})
        except ExperimentError as error:
            message = str(error)
        else:
            message = "one line"
            path.write_text(to_toml(to_table(config)), encoding="utf-8")
            assert load_config(path) == config, (name, key, value)
            read += 1
        assert len(message.splitlines()) == 1, (name, key, value)
        assert len(message) < 2000
    assert read


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a = " + "[" * 5000,
        "a." * 3000 + "a = 1",
        "[train]\nseed = " + "9" * 5000,
        "[train]\nseed = 99999999999999999999",
        "\ufeff[train]\nepochs = 1",
        "[train]\nepochs = 1\n[train]\nepochs = 2",
    ],
)
def test_a_file_that_no_run_can_use_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ExperimentError) as caught:
        load_config(path)
    assert "config.toml" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "train.epochs=5\nseed=3",
        "train.seed=" + "9" * 5000,
        "train.seed=" + "[" * 5000,
        "a." * 3000 + "a=1",
        "=5",
        "train..epochs=5",
        "train.epochs",
        "method.learning_rate=nan",
        "purpose=\ud800",
    ],
)
def test_an_override_that_no_run_can_use_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text("")
    with pytest.raises(ExperimentError) as caught:
        load_config(path, (text,))
    assert len(str(caught.value)) < 1000


def test_a_key_of_an_override_may_stand_in_quotes(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("")
    config = load_config(path, ('tune."method.learning_rate"=[0.1, 0.2]',))
    assert config.tune == {"method.learning_rate": [0.1, 0.2]}


def _options():
    """Yield section, name and option of every model and schedule."""
    for section, choices in (("model", MODELS), ("schedule", SCHEDULES)):
        for name, function in choices.items():
            for option, parameter in accepted(function).items():
                if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                    yield section, name, option


@pytest.mark.slow
@pytest.mark.parametrize(("section", "name", "option"), list(_options()))
def test_an_option_of_any_kind_trains_or_is_refused(section, name, option):
    data = {"name": "digits" if name != "transformer" else "python_docs", "limit": 40}
    table = {"data": data, "train": {"batch_size": 20, "epochs": 1}}
    dataset = load(from_table(table).data)
    outcomes = []
    for value in VALUES:
        try:
            trainer = Trainer(
                from_table({**table, section: {"name": name, option: value}}), dataset
            )
        except ExperimentError as error:
            outcomes.append(len(str(error)))
        else:
            assert np.isfinite(trainer.total_steps)
    assert max(outcomes) < 2000


@pytest.mark.slow
@pytest.mark.parametrize("option", ["b1", "eps", "momentum", "mask"])
@pytest.mark.parametrize("name", ["adam", "sgd", "tso_alra"])
def test_an_option_of_a_method_of_any_kind_compiles_or_is_refused(name, option):
    table = {"data": {"limit": 40}, "model": {"name": "linear"}, "train": {"batch_size": 20}}
    dataset = load(from_table(table).data)
    outcomes = []
    for value in VALUES:
        try:
            config = from_table({**table, "method": {"name": name, option: value}})
            Trainer(config, dataset).compile()
        except ExperimentError as error:
            outcomes.append(len(str(error).splitlines()))
    assert set(outcomes) == {1}


def test_the_starter_says_what_the_defaults_are(tmp_path, monkeypatch):
    from optalr.experiments.configs.starting import example_names, read_example, starter

    assert from_table(tomllib.loads(starter())) == Config()
    # Each comment that looks like a setting is one.
    lines = [line.removeprefix("# ") for line in starter().splitlines()]
    settings = [line for line in lines if " = " in line and not line.startswith('"')]
    assert len(settings) >= sum(len(to_table(Config())[name]) for name in SECTIONS)
    assert from_table(tomllib.loads(read_example("adam"))).method.name == "adam"
    with pytest.raises(ExperimentError, match="no example 'adm': did you mean 'adam'"):
        read_example("adm")
    assert "tso_alra" in example_names()
