"""The report of a comparison: what is written, and what the table says."""

import base64
import csv

import pytest

from optalr.experiments.reports import pictures
from optalr.experiments.reports.axes import to_png
from optalr.experiments.reports.tables import write_report
from tests.experiments.made_runs import MadeRun, write_comparison


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    runs = {
        "good": [MadeRun([4.0, 1.0, 0.5], 1), MadeRun([4.0, 2.0, 1.0], 1)],
        "half": [MadeRun([4.0, 3.0, 2.0], 1), MadeRun([4.0, 9.0, 9.0], 1, diverged=True)],
        "slow": [MadeRun([4.0, 3.5, 3.0], 1)],
        "wild": [MadeRun([4.0, 9.0], 1, diverged=True)] * 2,
    }
    comparison = write_comparison(tmp_path_factory.mktemp("reports") / "made", runs, target=2.0)
    return comparison, write_report(comparison)


def test_the_table_counts_what_is_missing_diverged_or_never_there(report):
    _, table = report
    problem = "digits, mlp, 20 epochs, batch 128"
    assert table.title == f"{problem}: mean ± standard deviation over 2 seeds"
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert list(rows) == [
        "good",
        "half (1 of 2 diverged)",
        "slow (1 of 2 seeds)",
        "wild (2 of 2 diverged)",
    ]
    good, half, slow, wild = rows.values()
    assert good["train loss"] == "0.75 ± 0.35"
    assert good["steps to 2"] == "2.000"
    assert half["steps to 2"] == "3.000"
    assert slow["steps to 2"] == "never"
    assert slow["seconds to 2"] == "never"
    assert wild["steps to 2"] == wild["train loss"] == "-"


def test_the_files_are_the_figures_and_the_page_has_one_inside(report):
    comparison, table = report
    caption = "digits, mlp, 20 epochs, batch 128: mean and range over seeds"
    curves = to_png(pictures.draw_curves(comparison, caption, target=2.0))
    assert (comparison.path / "curves.png").read_bytes() == curves
    for name, draw in (("losses", pictures.draw_losses), ("rates", pictures.draw_rates)):
        written = (comparison.path / f"{name}.png").read_bytes()
        assert written == to_png(draw(comparison, caption))
    page = (comparison.path / "report.html").read_text()
    assert base64.b64encode(curves).decode() in page
    assert f"<h1>{table.title}</h1>" in page
    for cell in (cell for row in table.rows for cell in row):
        assert f"<td>{cell}</td>" in page
    # Who reaches whom: the good config is at the half one's final loss after two steps.
    assert "<tr><td>good</td><td>-</td><td>2</td><td>2</td></tr>" in page


def test_csv_files_have_a_row_a_config_and_a_row_a_run(report):
    comparison, _ = report
    with open(comparison.path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["config"] for row in rows] == ["good", "half", "slow", "wild"]
    assert (rows[0]["train_loss_mean"], rows[1]["diverged"]) == ("0.75", "1")
    with open(comparison.path / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(run["config"], run["seed"]) for run in runs][:4] == [
        ("good", "0"),
        ("good", "1"),
        ("half", "0"),
        ("half", "1"),
    ]
    assert [run["status"] for run in runs].count("diverged") == 3
