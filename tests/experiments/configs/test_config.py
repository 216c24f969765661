import pytest
from pydantic import ValidationError

from optalr.experiments.configs.config import Config, from_table, to_table
from optalr.experiments.configs.files import load_config, override, to_toml
from optalr.experiments.errors import ExperimentError, suggest


def _write(tmp_path, text):
    path = tmp_path / "experiment.toml"
    path.write_text(text)
    return path


def test_a_file_states_differences_only(tmp_path):
    path = _write(tmp_path, 'purpose = "try"\n[train]\nepochs = 3\n[method]\nmomentum = 0.5\n')
    config = load_config(path)
    assert config.train.epochs == 3
    assert config.train.batch_size == Config().train.batch_size
    assert config.method.options == {"momentum": 0.5}


def test_a_config_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.epochs = 3  # type: ignore[misc]


def test_a_method_may_have_an_argument_called_options():
    config = from_table({"method": {"name": "tso_alra", "options": {"block_size": 24}}})
    assert config.method.options == {"options": {"block_size": 24}}
    assert to_table(config)["method"]["options"] == {"block_size": 24}


def test_what_is_written_is_read_again(tmp_path):
    config = from_table(
        {
            "purpose": 'with "quotes", a \\ and\na second line',
            "model": {"name": "mlp", "hidden": [32, 16]},
            "tune": {"method.learning_rate": [0.1, 1e-5], "schedule.name": ["cosine"]},
            "record": {"tensorboard": True},
            "data": {"augment": ["flip"]},
        }
    )
    assert load_config(_write(tmp_path, to_toml(to_table(config)))) == config


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[train]\nepoch = 3\n", "'train.epochs'"),
        ("learning_rate = 3\n", "'method.learning_rate'"),
        ("[trian]\nepochs = 3\n", "'train'"),
        ("[train]\nepochs = 'ten'\n", "train.epochs .* must be a whole number"),
        ("[train]\nepochs = true\n", "train.epochs .* must be a whole number"),
        ("[train]\nepochs = 0\n", "train.epochs .* at least 1"),
        ("[data]\ntest_fraction = 1.5\n", "data.test_fraction .* between 0 and 0.9"),
        ("[train]\nloop = 'fast'\n", "train.loop"),
        ("train = 3\n", "train .* must be a section"),
        ("[data]\naugment = 'flip'\n", "data.augment .* a list"),
        ("[train\n", "not valid TOML"),
        ("[method]\nlearning_rate = nan\n", "method.learning_rate"),
        ("[train]\nepochs = '1'\n", "train.epochs .* must be a whole number .*, got '1'"),
        ("[train]\nepochs = 2.0\n", "train.epochs .* must be a whole number"),
        ("[method]\nlearning_rate = '1e-3'\n", "method.learning_rate .* must be a number"),
        ("[record]\ntensorboard = 1\n", "record.tensorboard .* must be true or false"),
        ("[data]\naugment = [3]\n", r"data\.augment\.0 .* must be text"),
        ("[train.epochs]\na = 3\n", "train.epochs .* must be a whole number"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(tmp_path, text, wanted):
    with pytest.raises(ExperimentError, match=wanted) as caught:
        load_config(_write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path):
    _write(tmp_path, "")
    with pytest.raises(ExperimentError, match=r"experimnt.toml: did you mean .*experiment.toml"):
        load_config(tmp_path / "experimnt.toml")
    with pytest.raises(ExperimentError, match="is a folder"):
        load_config(tmp_path)


def test_overrides_from_the_command_line(tmp_path):
    path = _write(tmp_path, "[train]\nepochs = 3\n")
    config = load_config(path, ("train.epochs=5", "method.name=adam", "model.hidden=[8]"))
    assert config.train.epochs == 5
    assert config.method.name == "adam"
    assert config.model.options == {"hidden": [8]}
    with pytest.raises(ExperimentError, match="--set takes section"):
        load_config(path, ("train.epochs",))
    with pytest.raises(ExperimentError, match="purpose is a value"):
        load_config(_write(tmp_path, "purpose = 'a'\n"), ("purpose.x=1",))


def test_override_returns_a_checked_copy():
    changed = override(Config(), {"method.learning_rate": 1, "method.momentum": 0.9})
    assert changed.method.learning_rate == 1.0
    assert changed.method.options == {"momentum": 0.9}
    with pytest.raises(ExperimentError, match=r"train\.epochs"):
        override(Config(), {"train.epoch": 1})


def test_suggestions():
    assert suggest("adma", ["adam", "sgd"]) == "did you mean 'adam'?"
    assert suggest("zzz", ["adam", "sgd"]) == "valid: adam, sgd."
