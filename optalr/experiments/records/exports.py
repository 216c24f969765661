"""A run's metrics for other tools: CSV and TensorBoard."""

import csv
import math
from pathlib import Path

from optalr.experiments.errors import ExperimentError
from optalr.experiments.records.run_folder import EVALUATIONS, METRICS, RunFolder


def export_csv(folder: RunFolder) -> list[Path]:
    """Write ``metrics.csv`` and ``evaluations.csv`` beside the JSONL files."""
    written = []
    for name in (METRICS, EVALUATIONS):
        rows = folder.rows(name)
        keys = list(dict.fromkeys(key for row in rows for key in row))
        path = folder.path / name.replace(".jsonl", ".csv")
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, keys, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        written.append(path)
    return written


def export_tensorboard(folder: RunFolder) -> Path:
    """Write the metrics as TensorBoard events into ``tensorboard/``, in place of earlier ones.

    Raises:
      ExperimentError: tensorboardX, which the ``experiments`` extra does not bring, is missing.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ExperimentError(
            "TensorBoard events are written by tensorboardX: pip install tensorboardX, or set "
            "record.tensorboard=false."
        ) from None
    path = folder.path / "tensorboard"
    path.mkdir(exist_ok=True)
    for old in path.glob("events.*"):
        old.unlink()
    with SummaryWriter(str(path)) as writer:
        for name, group in ((METRICS, "train"), (EVALUATIONS, "evaluation")):
            for row in folder.rows(name):
                for key, value in row.items():
                    if key not in ("step", "epoch", "seconds") and math.isfinite(value):
                        writer.add_scalar(f"{group}/{key}", value, int(row["step"]))
    return path
