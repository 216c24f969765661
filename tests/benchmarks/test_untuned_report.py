"""The bench's report: crossings, ties, goals, profiles, and pages that survive missing runs."""

import numpy as np
import pytest

from benchmarks.untuned_parts import pictures, reporting, tables
from benchmarks.untuned_parts.curves import TEST, Run, crossing, mean_and_error
from benchmarks.untuned_parts.goals import (
    Goal,
    Tally,
    compare,
    final_loss,
    geometric_mean,
    goals,
    loss_ratios,
    tally,
    tally_early,
)
from benchmarks.untuned_parts.methods import METHODS
from benchmarks.untuned_parts.profiles import all_costs, profile
from benchmarks.untuned_parts.running import NUM_GRID_POINTS, NUM_POINTS
from benchmarks.untuned_parts.storing import Store
from tests.benchmarks.untuned_runs import ROLES, bench, record, with_final_scores

NAN, INF = float("nan"), float("inf")

# Curves.


@pytest.mark.parametrize(
    ("target", "step"),
    [
        (4.0, 0.0),  # from the start
        (3.0, 10.0),  # at a point
        (2.0, 15.0),  # half way between two
        (1.5, 17.5),
        (1.0, 20.0),
        (0.9, INF),  # never
    ],
)
def test_a_loss_is_reached_on_straight_lines_between_points(target, step):
    steps, losses = np.array([0.0, 10, 20, 30]), np.array([4.0, 3, 1, 2])
    assert crossing(steps, losses, target) == pytest.approx(step)


def test_a_loss_is_reached_where_it_is_reached_first():
    assert crossing(np.arange(4.0), np.array([2.0, 0, 2, 0]), 1.0) == 0.5


def test_no_line_is_drawn_from_a_loss_that_is_no_number():
    assert crossing(np.arange(3.0), np.array([INF, 1, 0]), 1.5) == 1.0


def test_a_run_that_broke_off_ends_at_infinity():
    run = Run.of(record([2.0, 1.0, NAN]))
    assert (run.final(TEST), run.error, run.lowest(TEST)) == (INF, INF, 1.0)


def test_the_standard_error_is_that_of_the_mean():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / np.sqrt(3)))
    assert mean_and_error([2.0]) == (2.0, 0.0)


# Comparisons.


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((-0.3, -0.2, -0.1), "better"),
        ((0.1, 0.2, 0.3), "worse"),
        # The standard error is 0.1 / √3 = 0.058: half of it lies between these two means.
        ((-0.12, -0.02, 0.08), "level"),
        ((-0.13, -0.03, 0.07), "better"),
        ((0.0, 0.0, 0.0), "level"),
        ((0.1,), "worse"),  # one seed tells nothing of the error
        ((INF, -0.1, -0.1), "worse"),
        ((-INF, 0.1, 0.1), "better"),
        ((-INF, INF, 0.1), "level"),
    ],
)
def test_a_difference_within_half_a_standard_error_is_a_tie(differences, verdict):
    ours = {seed: max(d, 0.0) for seed, d in enumerate(differences)}
    theirs = {seed: max(-d, 0.0) for seed, d in enumerate(differences)}
    assert compare(ours, theirs).verdict == verdict


def test_seeds_are_paired():
    # Seeds differ far more than methods do.
    ours, theirs = {0: 1.0, 1: 5.0, 2: 9.0}, {0: 1.1, 1: 5.1, 2: 9.1, 3: 0.0}
    comparison = compare(ours, theirs)
    assert comparison.verdict == "better"
    assert comparison.difference == pytest.approx(-0.1)


def test_two_runs_that_broke_off_are_level():
    assert compare({0: INF}, {0: INF}).verdict == "level"


# Goals.


def counted(*verdicts, missing=0):
    roles = {str(i): "end" for i in range(len(verdicts) + missing)}
    return Tally({str(i): verdict for i, verdict in enumerate(verdicts)}, roles)


@pytest.mark.parametrize(
    ("tallied", "ties_meet", "result"),
    [
        (counted("better", "better", "worse"), False, "met"),
        (counted("better", "level", "worse"), False, "met with ties"),
        (counted("better", "level", "worse"), True, "met"),
        (counted("better", "worse", "worse"), False, "missed"),
        (counted("better", "worse", missing=1), False, "open"),
        (counted("worse", "worse", missing=1), False, "missed"),
        (counted("better", "better", missing=1), False, "met"),
    ],
)
def test_a_goal_is_met_with_ties_missed_or_open(tallied, ties_meet, result):
    assert Goal("", 2, tallied, ties_meet).result == result


def two_problems():
    """Ours is lower and early on the first problem alone, the peer on none."""
    seeds = range(3)
    runs = {}
    for problem, ours in (("first", [2.0, 1.0, 0.5]), ("second", [2.0, 1.8, 1.1])):
        runs[problem, "adam"] = {s: record([2.0, 1.5, 1.0]) for s in seeds}
        runs[problem, "ours"] = {s: record(ours, method="ours", seconds=20.0) for s in seeds}
        runs[problem, "peer"] = {s: record([2.0, 2.0, 2.0], method="peer") for s in seeds}
        less = [*ours[:2], 2 * ours[2]]
        runs[problem, "ours_less"] = {s: record(less, method="ours_less") for s in seeds}
    return bench(runs)


def test_problems_are_counted_all_and_by_role():
    found = tally(two_problems(), "ours", "adam", value=final_loss)
    assert dict(found.verdicts) == {"first": "better", "second": "worse"}
    assert [found.shown(role) for role in (None, "development", "end")] == [
        "1 / 0 / 1",
        "1 / 0 / 0",
        "0 / 0 / 1",
    ]


def test_steps_and_seconds_until_adams_best_validation_loss():
    found = two_problems()
    shares = found.share_until_validation("first", "ours")
    assert shares == {0: 0.5, 1: 0.5, 2: 0.5}
    assert found.in_seconds("first", "ours", shares) == {0: 10.0, 1: 10.0, 2: 10.0}
    assert found.relative_seconds("first", "ours") == 2.0
    assert set(found.share_until_validation("second", "ours").values()) == {INF}
    early = tally_early(found, "ours", of_adams=True)
    assert dict(early.verdicts) == {"first": "better", "second": "worse"}


def test_early_is_measured_by_a_run_or_by_adams_own_steps():
    # Adam is at its best after half of the run, ours a little sooner.
    runs = {("first", "adam"): {0: record([2.0, 1.0, 1.5])}}
    runs["first", "ours"] = {0: record([2.0, 0.8, 0.8], method="ours")}
    found = bench(runs)
    assert tally_early(found, "ours", of_adams=False).verdicts == {"first": "better"}
    assert tally_early(found, "ours", of_adams=True).verdicts == {"first": "worse"}


def test_a_recipe_without_runs_has_open_goals():
    found = goals(two_problems(), "nobody")
    assert all(goal.counted.num_missing == len(ROLES) for goal in found)


def test_losses_are_compared_as_ratios_of_means():
    ratios = loss_ratios(two_problems(), "ours", "adam")
    assert ratios == pytest.approx({"first": 0.5, "second": 1.1})
    assert geometric_mean([0.5, 2.0, NAN]) == pytest.approx(1.0)


# Profiles.


def test_a_profile_is_the_share_within_a_factor_of_the_best():
    costs = np.array([[1.0, 2.0], [4.0, 1.0], [3.0, INF], [INF, INF]])
    shares = profile(costs, np.array([1.0, 2.0, 3.9, 4.0, 1e9]))
    np.testing.assert_allclose(shares, [[0.5, 0.5, 0.5, 0.75, 0.75], [0.25, 0.5, 0.5, 0.5, 0.5]])


def test_what_costs_nothing_is_as_good_as_the_best():
    shares = profile(np.array([[0.0, 0.0, 1e3]]), np.ones(1))
    np.testing.assert_array_equal(shares, [[1.0], [1.0], [0.0]])


def test_profiles_are_of_the_methods_that_have_runs_on_all_problems_shown():
    runs = {("first", name): {0: record([2.0, 1.0], method=name)} for name in ("adam", "ours")}
    runs["second", "adam"] = {0: record([2.0, 1.0])}
    runs["second", "peer"] = {0: record([2.0, 1.0], method="peer")}
    costs = all_costs(bench(runs), "ours")["steps"]
    assert (costs.problems, costs.methods) == (["first"], ["adam", "ours"])
    assert costs.values.tolist() == [[1.0, 1.0]]


# What is shown.


def test_a_problem_has_a_row_for_each_method():
    text = tables.problem_table(two_problems(), "first")
    assert "accuracy %" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["adam", "ours", "peer", "ours_less"]
    assert "| never | never |" in rows[2]


def test_a_regression_shows_its_error():
    run = record([2.0, 1.0], score=-1.0)
    found = bench({("first", "adam"): {0: with_final_scores(run, -0.25)}})
    text = tables.problem_table(found, "first")
    assert "squared error" in text
    assert "0.250 ± 0" in text


def test_ablations_are_compared_with_the_full_recipe():
    row = tables.ablation_table(two_problems(), "ours").splitlines()[-1]
    assert row == "| `ours_less` | 2.000 | 2 of 2 | 2.00 | 2.00 |"


def test_an_ablation_may_name_what_it_is_taken_from():
    runs = {"ours": 4.0, "peer": 1.0, "peer_less": 3.0}
    found = bench({("first", name): {0: record([5.0, loss])} for name, loss in runs.items()})
    row = tables.ablation_table(found, "ours").splitlines()[-1]
    assert row == "| `peer_less` | 3.000 | 1 of 1 | 3.00 | ? |"


def test_missing_runs_are_named():
    found = bench({("first", "adam"): {0: record([2.0, 1.0])}})
    assert "* `adam`: 1 of 2 problems; missing second." in tables.missing_text(found)


def test_labels_keep_apart_and_stay_inside():
    heights = np.array([0.0, 0.5, 0.5, 0.52, 1.0, 1.0])
    placed = pictures.apart(heights, 0.1)
    assert np.diff(placed).min() >= 0.1 - 1e-9
    assert placed.min() >= 0
    assert placed.max() <= 1
    np.testing.assert_allclose(pictures.apart(np.array([0.1, 0.5]), 0.1), [0.1, 0.5])


def test_profiles_are_drawn_with_a_name_for_each_line():
    figure = pictures.draw_profiles(two_problems(), "ours")
    for axis in figure.axes:
        assert {text.get_text() for text in axis.texts} == {"adam, tuned", "ours", "peer"}


def test_the_report_goes_on_with_what_exists(tmp_path):
    folder, images = tmp_path / "runs", tmp_path / "images"
    assert "nothing to report" in reporting.write(folder, images, recipe="adam_1e-3")
    store = Store("cancer_mlp", folder)
    numbers = METHODS["adam"].grid[0]
    store.add(record([2.0, 1.0], numbers=numbers, num_points=NUM_GRID_POINTS))
    for seed in range(2):
        store.add(record([2.0, 1.0, 0.9], numbers=numbers, seed=seed, num_points=NUM_POINTS))
        ours = record([2.0, 0.9, NAN if seed else 0.8], method="adam_1e-3", seed=seed, jax="1.2.3")
        store.add({**ours, "num_points": NUM_POINTS})
    summary = reporting.write(folder, images, recipe="adam_1e-3")
    page = (tmp_path / "runs.md").read_text()
    assert "0 / 0 / 1 (1 of 10 problems)" in summary
    assert "0.800 ± 0 (1 broke off)" in page
    assert "No runs yet." in page
    assert "* `adam_1e-3`: 1 of 10 problems" in page
    assert "| 2 | unknown | 1.2.3 | unknown | unknown |" in page
    assert {path.name for path in images.iterdir()} == {
        "untuned_curves.png",
        "untuned_profiles.png",
    }
    assert "No runs of `prodigy`" in reporting.summary(reporting.read(folder), "prodigy")
