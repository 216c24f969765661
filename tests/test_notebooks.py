"""Every notebook runs from top to bottom, on a small budget, and is kept with its outputs."""

import os
import pathlib

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
    (first, *_) = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert 'checkout[0]}[experiments]" if checkout else "optalr[experiments]"' in first
    same = nbformat.read(NOTEBOOKS[0], as_version=4).cells
    assert first == next(cell.source for cell in same if cell.cell_type == "code")


def test_every_notebook_is_a_page_of_the_site():
    pages = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    (listed,) = [section["Notebooks"] for section in pages if "Notebooks" in section]
    shown = {page for entry in listed for page in entry.values()}
    assert shown == {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
