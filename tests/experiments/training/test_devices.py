"""Several devices that share each batch: the same run, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.experiments import cli
from optalr.experiments.configs.config import from_table
from optalr.experiments.errors import ExperimentError
from optalr.experiments.records.run_folder import METRICS, RunFolder
from optalr.experiments.training.devices import mesh_table
from optalr.experiments.training.loop import open_unfinished, train
from optalr.experiments.training.steps import Batch
from optalr.experiments.training.trainer import Trainer


def _config(devices, loop="scan", **options):
    return from_table(
        {
            "data": {"limit": 192},
            "model": {"hidden": [16]},
            "method": {
                "name": "tso_alra",
                "switch_at": 9,
                "options": {"warmup": 0, "min_batches": 1, **options},
            },
            "train": {"epochs": 4, "batch_size": 64, "loop": loop},
            "mesh": {"data": devices},
            "record": {"checkpoint_every": 1},
        }
    )


def _losses(path, config, report=lambda row: None):
    folder = RunFolder.create(path, config)
    train(Trainer(config), folder, report)
    return [row["loss"] for row in folder.rows(METRICS)]


@pytest.mark.parametrize("loop", [pytest.param("scan", marks=pytest.mark.slow), "step"])
def test_losses_do_not_depend_on_the_number_of_devices(tmp_path, loop):
    one = _losses(tmp_path / "one", _config(0, loop))
    several = _losses(tmp_path / "several", _config(4, loop))
    assert len(one) == 12
    np.testing.assert_allclose(several, one, rtol=1e-4)


def _compiled_step(config):
    trainer = Trainer(config)
    x, y = trainer.place.examples(trainer.dataset.train, np.arange(64))
    batch = Batch(x, y, jnp.float32(jnp.nan))
    lowered = jax.jit(trainer.step).lower(trainer.init(0), trainer.place.key(0), batch)
    return lowered.compile().as_text()


@pytest.mark.slow
def test_factors_in_parts_get_their_rows_of_the_sums(tmp_path):
    losses = [
        _losses(tmp_path / str(devices), _config(devices, sharded_factors=bool(devices)))
        for devices in (0, 4)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert "reduce-scatter" in _compiled_step(_config(4, sharded_factors=True))
    assert "reduce-scatter" not in _compiled_step(_config(4))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, caplog):
    whole = _losses(tmp_path / "whole", _config(4))

    def interrupt(row):
        if row["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _losses(tmp_path / "cut", _config(4), interrupt)
    trainer, folder = open_unfinished(tmp_path / "cut", {"mesh": {"data": 2}})
    train(trainer, folder)
    losses = [row["loss"] for row in folder.rows(METRICS)]
    np.testing.assert_allclose(losses, whole, rtol=1e-4)
    assert "mesh: data=4 -> data=2" in caplog.text


def test_what_devices_cannot_share_is_refused(tmp_path, capsys):
    with pytest.raises(ExperimentError, match=r"mesh.data 1000 needs 1000 devices, and jax sees"):
        Trainer(_config(1000))
    with pytest.raises(ExperimentError, match=r"batch_size 64 is no multiple of mesh\.data 3"):
        Trainer(_config(3))
    for text in ("8", "model=2", "data=", "data=-1", "data=x"):
        with pytest.raises(ExperimentError, match="as in --mesh data=8"):
            mesh_table(text)
    with pytest.raises(SystemExit):
        cli.main(["run", "configs/digits/adam.toml", "--mesh", "8", "--out", str(tmp_path / "run")])
    assert "--mesh data=8" in capsys.readouterr().err
