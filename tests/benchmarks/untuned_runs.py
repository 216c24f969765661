"""Runs of the bench as if they had been made: records with a curve that a test states."""

import numpy as np
import optax

from benchmarks.untuned_parts.curves import TEST_SCORE, Run
from benchmarks.untuned_parts.gathering import Bench
from benchmarks.untuned_parts.methods import Method

NUM_POINTS, NUM_GRID_POINTS = 16, 4
ROLES = {"first": "development", "second": "end"}


def record(losses, *, method="adam", seed=0, seconds=10.0, score=0.9, **more):
    """Return a run over 100 steps whose three losses are the same."""
    steps = np.linspace(0, 100, len(losses))
    curve = [[step, *([loss, score] * 3)] for step, loss in zip(steps, losses, strict=True)]
    return {
        "method": method,
        "numbers": {},
        "seed": seed,
        "seconds": seconds,
        "curve": curve,
        "num_points": NUM_POINTS,
        **more,
    }


def method(name, **options):
    return Method(name, name, lambda numbers, total_steps: optax.identity(), **options)


METHODS = {
    m.name: m
    for m in (
        method("adam", grid=({"rate": 1e-3}, {"rate": 1e-2})),
        method("ours"),
        method("peer"),
        method("ours_less", ablation=True),
        method("peer_less", ablation=True, whole="peer"),
    )
}


def bench(runs):
    """Return a bench of ``(problem, method) -> seed -> record``."""
    made = {place: {s: Run.of(r) for s, r in by_seed.items()} for place, by_seed in runs.items()}
    return Bench(ROLES, METHODS, made)


def with_final_scores(run, score):
    """Return a run's record with another final test score."""
    curve = [list(row) for row in run["curve"]]
    curve[-1][TEST_SCORE] = score
    return {**run, "curve": curve}
