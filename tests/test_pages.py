"""The code of a page is one program, and runs as it stands there, as its reader would run it."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Pages that say so of themselves.
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if "is one program" in p.read_text()]


def code_of(page):
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M))


def run(page, folder):
    program = folder / f"{page.stem}.py"
    program.write_text(code_of(page))
    user = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    user |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, str(program)], env=user, cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path):
    done = run(page, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    stated = re.findall(r"prints a test accuracy of ([\d.]+)", page.read_text())
    printed = re.findall(r"test accuracy ([\d.]+)", done.stdout)
    # Four test images of 397: what the rounding of another machine may change.
    assert [float(number) for number in printed] == pytest.approx(
        [float(s) for s in stated], abs=0.01
    )


def test_which_pages_run():
    assert {page.stem for page in PAGES} >= {
        "ten_minutes", "mixed_precision", "checkpoints", "reading_state", "migrating",
    }  # fmt: skip


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_shows_as_python_is_python(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        assert compile(code, page.name, "exec")


# The nav's "Methods" but for the page on the papers' claims.
METHODS = (
    "exponentially_decaying_flows", "learned_rate", "lecture", "lipschitz_rate", "swats",
    "tso_alra", "untuned",
)  # fmt: skip


def test_which_pages_are_on_methods():
    navigation = (ROOT / "mkdocs.yml").read_text()
    section = navigation.partition("  - Methods:\n")[2].partition("\n  - Measured:")[0]
    assert {*METHODS, "five_sources"} == set(re.findall(r": (\w+)\.md", section))


@pytest.mark.parametrize("page", METHODS)
def test_a_method_has_its_formula_set_as_mathematics(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    first, _, _ = text.partition("\n## Choosing\n")
    assert re.search(r"^\$\$\n.+?^\$\$$", first, re.DOTALL | re.MULTILINE)
    assert re.search(r"\\\(.+?\\\)", first)


@pytest.mark.parametrize("page", METHODS)
def test_a_method_is_shown_told_and_costed(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert "By hand" in headings or "(thirty_lines.md)" in text.partition("\n## ")[0]
    assert {"Choosing", "What we do otherwise"} <= set(headings)
    assert any("cost" in heading for heading in headings)
    usage, _, _ = text.partition("\n## ")
    assert "```python\n" in usage
    (picture, *_) = re.findall(r"!\[[^\]]+\]\((images/\w+\.png)\)", text)
    assert (ROOT / "docs" / picture).exists()
