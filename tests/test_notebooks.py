"""Every notebook runs from top to bottom, on a small budget, and is kept with its outputs."""

import ast
import importlib.util
import os
import pathlib
import re
import sys

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the kernel's own machinery warns
@every_notebook
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("OPTALR_NOTEBOOK_EPOCHS", "2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    assert all(
        output.output_type != "error"
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


def test_notebooks_are_stored_without_machine_paths():
    for path in NOTEBOOKS:
        assert str(pathlib.Path.home()) not in path.read_text()


@every_notebook
def test_a_notebook_is_kept_with_its_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 500_000


@every_notebook
def test_a_notebook_tells_a_story_with_a_takeaway(path):
    texts = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert texts[0].startswith("# ")
    assert any("**Takeaway.**" in text for text in texts)


@every_notebook
def test_a_notebook_is_ready_for_colab(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.accelerator == "GPU"
    assert install_cell(path) == install_cell(NOTEBOOKS[0])


def install_cell(path):
    """Return the source of a notebook's first cell of code, which installs what is missing."""
    cells = nbformat.read(path, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


def installed(monkeypatch, folder, *missing):
    """Run the cell in a folder where packages are missing; return what it hands to pip."""
    handed = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name not in missing or None)
    magic = '%pip install -q "{wanted}"'
    source = install_cell(NOTEBOOKS[0])
    assert source.count(magic) == 1
    exec(source.replace(magic, "install(wanted)"), {"install": handed.append})
    return handed


@pytest.mark.parametrize("missing", [["optalr"], ["sklearn"], ["flax", "matplotlib"]])
def test_whatever_is_missing_is_installed(missing, monkeypatch, tmp_path):
    """The core alone may be there, and Python finds ``optalr`` in the root of a checkout."""
    assert installed(monkeypatch, tmp_path, *missing) == ["optalr[experiments]"]
    (tmp_path / "optalr").mkdir()
    (tmp_path / "optalr" / "__init__.py").touch()
    (tmp_path / "notebooks").mkdir()
    for folder in (tmp_path, tmp_path / "notebooks"):
        assert installed(monkeypatch, folder, *missing) == [f"{tmp_path}[experiments]"]


def test_nothing_is_installed_where_nothing_is_missing(monkeypatch, tmp_path):
    assert installed(monkeypatch, tmp_path) == []


@every_notebook
def test_the_install_cell_asks_for_everything_that_a_notebook_imports(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    imported = {
        name.partition(".")[0]
        for cell in cells[1:]
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    (names,) = re.findall(r'^names = "(.*)"$', cells[0].source, re.MULTILINE)
    assert imported - set(sys.stdlib_module_names) <= set(names.split())


@every_notebook
def test_a_notebook_says_nothing_of_the_kernel_that_ran_it(path):
    assert nbformat.read(path, as_version=4).metadata.language_info == {"name": "python"}


def test_every_notebook_is_a_page_of_the_site():
    pages = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    (listed,) = [section["Notebooks"] for section in pages if "Notebooks" in section]
    shown = {page for entry in listed for page in entry.values()}
    assert shown == {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
