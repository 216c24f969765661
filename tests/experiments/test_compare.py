import math

import numpy as np

from optalr.experiments import compare
from optalr.experiments.config import Config
from optalr.experiments.record import RunFolder


def test_curves_lie_over_steps_and_seconds_and_full_batches_are_not_smoothed(tmp_path, monkeypatch):

    losses = np.linspace(2.0, 1.0, 21)
    for steps_per_epoch, window in ((1, 1), (5, compare.WINDOW)):
        rows = [
            {"step": i + 1, "epoch": (i + 1) / steps_per_epoch, "seconds": 0.5 * (i + 1)}
            | {"loss": loss, "accuracy": 0.5}
            for i, loss in enumerate(losses)
        ]
        at = [
            {"step": i, "seconds": 0.5 * i, "test_loss": 1.0, "test_accuracy": 0.5} for i in (0, 21)
        ]
        folder = RunFolder(tmp_path / f"{steps_per_epoch}")
        folder.path.mkdir()
        folder.append("metrics.jsonl", rows)
        folder.append("evaluations.jsonl", at)
        folder.finish({"status": "finished"})
        comparison = compare.Comparison(tmp_path, {"a": Config()}, (0,), math.nan)
        monkeypatch.setattr(compare.Comparison, "runs", lambda self, name, f=folder: [f])
        curves = compare.read_curves(comparison, "a")
        assert curves is not None
        assert curves.window == window
        assert curves.evaluation_seconds.tolist() == [0.0, 10.5]
        step = compare.first_reaching(curves, 1.5)[0][0]
        # The mean of ten losses lags by four and a half steps.
        assert step == (11 if window == 1 else 16)
