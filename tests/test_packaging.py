"""What users are handed: the wheel, the sdist, the README on an index, the project's papers."""

import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser

import pytest
import yaml

import optalr

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


def on_an_index(text: str) -> str:
    """Return the README as the build makes it, by the substitutions in ``pyproject.toml``."""
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_the_sdist_holds_what_git_tracks(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout to compare with")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert not tracked - names
    assert {"docs/index.md", "configs/digits/tso_alra.toml", "notebooks/quickstart.ipynb"} <= names
    assert {"tests/test_packaging.py", "benchmarks/untuned.py", "examples/plain_loop.py"} <= names


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        about = Parser().parsestr(archive.read(metadata).decode())
    paths = (path for end in ("*.py", "*.toml") for path in (ROOT / "optalr").rglob(end))
    sources = {path.relative_to(ROOT).as_posix() for path in paths}
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {*sources, "optalr/py.typed", "optalr_command.py"}
    assert about["Version"] == optalr.__version__
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().strip() == on_an_index(README).strip()
    assert "Project-URL" not in about  # there is no address yet


def test_the_readme_on_an_index_has_no_link_that_leads_nowhere():
    shown = on_an_index(README)
    assert re.search(r"\]\((?!https?:)", README)
    assert not re.search(r"\]\((?!https?:)", shown)
    assert "The page on it (`docs/untuned.md`)" in shown.replace("\n", " ")
    assert "```python" in shown


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT["project"]
    assert (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).samefile(optalr.__file__)
    pattern = rf"(?m)^(__)?version(__)?\s*[:=].*{re.escape(optalr.__version__)}"
    places = [*ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *(ROOT / "optalr").rglob("*.py")]
    assert [p.name for p in places if re.search(pattern, p.read_text())] == ["__init__.py"]


def test_no_address_is_invented():
    """The project has no home on the web yet, so no file may claim one."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *ROOT.glob("*.toml"), ROOT / "mkdocs.yml"]
    texts += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    for path in texts:
        assert not re.search(r"https?://[^\s)\"']*optalr", path.read_text()), path.name


def test_the_workflow_does_what_ci_run_does():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]


def test_forms_and_papers_are_well_formed():
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        fields = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= fields.keys()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["authors"] == [{"name": "The optalr developers"}]


def test_classifiers_name_the_supported_versions():
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert versions <= set(PROJECT["project"]["classifiers"])


def test_the_core_brings_no_module_that_jax_and_optax_do_not():
    """What makes an import slow is what it imports; ``jax.extend`` and Pallas come when needed."""
    program = (
        "import sys, jax, optax; before = set(sys.modules); import optalr; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}), sep=',')\n"
        "print([m for m in sys.modules if m.startswith(('jax.extend', 'jax._src.pallas'))])"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    brought, lazy = done.stdout.splitlines()
    assert set(brought.split(",")) <= {"optalr", "jax"} | set(sys.stdlib_module_names)
    assert lazy == "[]"
