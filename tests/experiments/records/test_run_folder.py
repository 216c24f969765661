"""The folder of a run on disk."""

import json

import jax
import numpy as np
import pytest

from optalr.experiments.configs.config import Config
from optalr.experiments.errors import ExperimentError
from optalr.experiments.records.run_folder import METRICS, RunFolder
from optalr.experiments.records.writing import free_path


def test_nothing_is_overwritten(tmp_path):
    folder = RunFolder.create(tmp_path / "whole", Config())
    with pytest.raises(ExperimentError, match="exists and is not overwritten"):
        RunFolder.create(folder.path, Config())
    assert free_path(folder.path).name == "whole-2"


def test_a_new_folder_holds_the_config_and_the_environment(tmp_path):
    folder = RunFolder.create(tmp_path / "new", Config())
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.toml",
        "environment.json",
    ]
    assert folder.config() == Config()
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert folder.result() is None


def test_a_number_that_is_not_finite_is_null_on_disk(tmp_path):
    folder = RunFolder(tmp_path)
    folder.finish({"loss": float("inf"), "pair": (1.0, float("nan"))})
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == {"loss": None, "pair": [1.0, None]}
    result = folder.result()
    assert result is not None
    assert np.isnan(result["loss"])


def test_a_torn_last_line_is_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / METRICS).write_text('{"step": 1, "loss": null}\n{"step": 2, "lo')
    rows = folder.rows(METRICS)
    assert [row["step"] for row in rows] == [1]
    assert np.isnan(rows[0]["loss"])
    folder.cut(METRICS, 5)
    assert (tmp_path / METRICS).read_text() == '{"step": 1, "loss": null}\n'
