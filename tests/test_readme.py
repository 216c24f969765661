"""The README's first example runs exactly as it stands, and prints what the README says."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
(EXAMPLE,) = re.findall(r"<!-- the first example -->\n```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example_is_a_whole_program():
    imported = {
        name
        for node in ast.parse(EXAMPLE).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert {"jax", "optax", "optalr"} <= imported


@pytest.mark.slow
def test_the_first_example_prints_what_the_readme_says(tmp_path):
    program = tmp_path / "example.py"
    program.write_text(EXAMPLE)
    # As a user runs it: without the flags and settings of the test suite.
    user = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    user |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(program)], env=user, check=True, capture_output=True, text=True
    )
    measured = float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1])
    stated = float(re.search(r"a test accuracy of ([\d.]+) %", README)[1])
    # Four test images of 397: what the rounding of another machine may change.
    assert abs(measured - stated) <= 1.0
    # The loss of one batch at the end: a factor of two. (In float64 it is 0.0007.)
    loss = float(re.search(r"training loss ([\d.]+),", done.stdout)[1])
    assert 0.5 <= loss / float(re.search(r"prints a training loss of ([\d.]+) ", README)[1]) <= 2.0


@pytest.mark.parametrize("rival", ["adam", "adamw", "muon", "soap"])
def test_the_losses_beside_others_are_those_of_the_report(rival):
    report = (ROOT / "benchmarks" / "results" / "untuned.md").read_text()
    ratio = re.search(rf"^\| `{rival}` \| (0\.\d+) \| \d+ of 10", report, re.MULTILINE)[1]
    counts = re.search(rf"^\| `{rival}` \| 10 of 10 \| (\d+ / \d+ / \d+) ", report, re.MULTILINE)[1]
    section = README.partition("## Beside others")[2].partition("\n## ")[0]
    assert f"{float(ratio):.2f}" in section
    assert counts in section or (rival == "adam" and counts == "10 / 0 / 0")


def ratios_of(table, method):
    """Return a row of a table of the report of ``untuned``, by the names of its columns."""
    report = (ROOT / "benchmarks" / "results" / "untuned.md").read_text().partition(table)[2]
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    (row,) = [row for row in rows if row[0] == f"`{method}`"][:1]
    return dict(zip(rows[0], row, strict=True))


@pytest.mark.parametrize("name", ["README.md", "docs/untuned.md", "docs/which_method.md"])
def test_where_untuned_loses_is_told_alike_on_all_pages(name):
    over = ratios_of("### Final test loss of `untuned` over", "adamw")
    resnet, vgg = (round(100 * (float(over[net]) - 1)) for net in ("mnist resnet", "fashion vgg"))
    page = " ".join((ROOT / name).read_text().split())
    assert re.search(rf"by {resnet} and {vgg} %|loses {resnet} and {vgg} %", page)


def cost_of(page, method):
    """Return what a step of a method takes, by the first line of a table that has it in a cell."""
    text = (ROOT / page).read_text()
    row = next(line for line in text.splitlines() if re.search(rf"\| `{method}\(", line))
    return re.search(r"\| ([\d.]+(?: to [\d.]+)? of \w+'s)", row)[1]


@pytest.mark.parametrize(
    "method", ["untuned", "tso_alra", "edf", "learned_rate_sgd", "lipschitz_sgd"]
)
def test_the_table_of_methods_and_the_decision_table_have_the_same_costs(method):
    assert cost_of("README.md", method) == cost_of("docs/which_method.md", method)


def test_what_validation_batches_are_worth_is_that_of_the_report():
    without = ratios_of("## Without each part", "untuned_no_validation")
    ratio = float(without["geometric mean"])
    for name in ("docs/which_method.md", "examples/algoperf/README.md"):
        page = " ".join((ROOT / name).read_text().split())
        assert f"{round(100 * (ratio - 1))} % more test loss" in page
    row = f"the decay stays where it starts | {ratio:.2f} |"
    assert row in (ROOT / "docs" / "measured" / "untuned.md").read_text()


# The columns of the README's table of peers, by their names in the report.
PEERS = (
    "untuned", "adam", "adamw", "schedule_free", "prodigy", "muon", "psgd_kron", "kfac_root",
    "somax_sgn",
)  # fmt: skip


@pytest.mark.parametrize(
    ("problem", "row"),
    [
        ("digits_mlp", "digits, MLP"),
        ("fashion_cnn", "Fashion-MNIST, CNN"),
        ("python_transformer", "Python's reference, transformer"),
        ("diabetes_mlp", "diabetes, regression"),
    ],
)
def test_the_losses_of_the_peers_are_those_of_their_report(problem, row):
    report = (ROOT / "benchmarks" / "results" / "peers.md").read_text()
    part = report.split(f"## {problem}")[1].split("\n## ")[0]
    stored = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (\S+) ±", part, re.MULTILINE))
    (cells,) = re.findall(rf"^\| {row} \| (.+) \|$", README, re.MULTILINE)
    shown = [cell.strip("* ") for cell in cells.split("|")]
    numbers = [float(stored[name]) if name in stored else None for name in PEERS]
    # As many digits as the report has.
    assert shown == ["not run" if x is None else f"{x:.{3 if x < 1 else 2}f}" for x in numbers]
