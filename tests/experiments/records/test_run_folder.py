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


def test_rows_follow_a_torn_line_as_if_it_had_not_been_written(tmp_path):
    RunFolder(tmp_path).append(METRICS, [{"step": 1}, {"step": 2}])
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-20])
    RunFolder(tmp_path).append(METRICS, [{"step": 2}, {"step": 3}])
    assert [row["step"] for row in RunFolder(tmp_path).rows(METRICS)] == [1, 2, 3]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3]
