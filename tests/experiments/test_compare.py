import math
from pathlib import Path

import numpy as np

from optalr.experiments.configs.config import Config
from optalr.experiments.records.run_folder import RunFolder
from optalr.experiments.reports import pictures
from optalr.experiments.studies import compare


def _finished_run(path: Path, losses: np.ndarray, steps_per_epoch: int) -> RunFolder:
    """Write a run of half a second a step, evaluated before the first step and after the last."""
    rows = [
        {"step": i + 1, "epoch": (i + 1) / steps_per_epoch, "seconds": 0.5 * (i + 1)}
        | {"loss": loss, "accuracy": 0.5}
        for i, loss in enumerate(losses)
    ]
    at = [
        {"step": i, "seconds": 0.5 * i, "test_loss": 1.0, "test_accuracy": 0.5}
        for i in (0, len(losses))
    ]
    path.mkdir()
    folder = RunFolder(path)
    folder.append("metrics.jsonl", rows)
    folder.append("evaluations.jsonl", at)
    folder.finish({"status": "finished"})
    return folder


def test_curves_lie_over_steps_and_seconds_and_full_batches_are_not_smoothed(tmp_path, monkeypatch):
    losses = np.linspace(2.0, 1.0, 21)
    for steps_per_epoch, window in ((1, 1), (5, compare.WINDOW)):
        folder = _finished_run(tmp_path / f"{steps_per_epoch}", losses, steps_per_epoch)
        comparison = compare.Comparison(tmp_path, {"a": Config()}, (0,), math.nan)
        monkeypatch.setattr(compare.Comparison, "runs", lambda self, name, f=folder: [f])
        curves = compare.read_curves(comparison, "a")
        assert curves is not None
        assert curves.window == window
        assert curves.evaluation_seconds.tolist() == [0.0, 10.5]
        step = compare.first_reaching(curves, 1.5)[0][0]
        # The mean of ten losses lags by four and a half steps.
        assert step == (11 if window == 1 else 16)


def test_full_batches_and_mini_batches_are_drawn_over_epochs(tmp_path, monkeypatch):
    folders = {
        "full": _finished_run(tmp_path / "full", np.linspace(2.0, 1.0, 4), 1),
        "mini": _finished_run(tmp_path / "mini", np.linspace(2.0, 0.1, 20), 5),
        "long": _finished_run(tmp_path / "long", np.linspace(2.0, 0.1, 75), 5),
    }
    monkeypatch.setattr(compare.Comparison, "runs", lambda self, name: [folders[name]])
    drawn = []
    monkeypatch.setattr(pictures, "_finish", lambda figure, *_: drawn.append(figure) or b"")
    for names, label, ends, scale in (
        (["full", "mini"], "epoch", [4, 4], "linear"),
        (["mini"], "step", [20], "linear"),
        (["long", "mini"], "step", [75, 20], "log"),
    ):
        chosen = compare.Comparison(tmp_path, {name: Config() for name in names}, (0,), math.nan)
        pictures.draw_selection(chosen)
        over_steps, over_seconds = drawn.pop().axes
        assert (over_steps.get_xlabel(), over_steps.get_xscale()) == (label, scale)
        assert [line.get_xdata()[-1] for line in over_steps.lines] == ends
        assert over_seconds.get_xlabel() == "seconds of training"
        assert over_seconds.get_xscale() == "linear"
        assert over_seconds.lines[-1].get_xdata()[-1] == 10.0
