"""The commands that train nothing, and what the others refuse before they do."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optalr.experiments import cli, commands, endings
from optalr.experiments.configs.config import Config
from optalr.experiments.configs.files import load_config
from optalr.experiments.errors import suggest
from optalr.experiments.records.locks import locked
from optalr.experiments.records.run_folder import RunFolder
from tests.experiments.refusing import fails
from tests.syntax import imports, package

ROOT = Path(__file__).parents[2]
SMALL = """
[data]
limit = 64
[model]
name = "linear"
[train]
epochs = 2
batch_size = 32
[tune]
"method.learning_rate" = [1e-2, 1e-5]
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "small.toml"
    path.write_text(SMALL)
    return str(path)


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("optalr 0.")


def test_a_config_to_start_from(config, capsys):
    cli.main(["init"])
    assert load_config("experiment.toml") == Config()
    assert "not overwritten: name another file" in fails(capsys, "init")
    cli.main(["init", "new/adam.toml", "--example", "adam"])
    assert load_config("new/adam.toml").method.name == "adam"
    assert "did you mean 'adam'" in fails(capsys, "init", "x.toml", "--example", "adm")


def test_the_options_of_a_name(capsys):
    cli.main(["list", "tso_alra"])
    shown = capsys.readouterr().out
    assert "power = -0.5" in shown
    assert "decay of the moving averages" in shown
    assert "learning_rate = " not in shown.replace("second_learning_rate = ", "")
    cli.main(["list", "cifar100"])
    assert "labels = 'fine'" in capsys.readouterr().out
    assert "did you mean 'cosine'" in fails(capsys, "list", "cosin")


def test_a_dry_run_writes_nothing(config, capsys):
    cli.main(["run", config, "--dry-run"])
    shown = capsys.readouterr().out
    for part in ("kronecker", "bytes of the method's state", "seconds of training, about"):
        assert part in shown
    assert not Path("runs").exists()


def test_a_run_whose_picture_fails_is_finished(config, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(commands, "plot_run", fail)
        cli.main(["run", config, "--out", "run"])
    captured = capsys.readouterr()
    assert "the picture could not be drawn; try `optalr plot run`" in captured.err
    assert captured.err.count("\n") == 1
    assert RunFolder("run").result()["status"] == "finished"
    cli.main(["plot", "run"])
    assert Path("run/curves.png").exists()
    cli.main(["watch", "run"])
    assert "finished" in capsys.readouterr().out
    picture = Path("run/curves.png").read_bytes()
    # Former run folders have neither numbers nor checksums.
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        path = Path("run") / name
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{k: v for k, v in r.items() if k not in ("row", "run", "check")} for r in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    Path("run/SHA256SUMS").unlink()
    cli.main(["plot", "run"])
    assert not capsys.readouterr().err
    assert Path("run/curves.png").read_bytes() == picture


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((), "name a command"),
        (("runn", "x"), "did you mean 'run'"),
        (("run",), "missing"),
        (("run", "{config}", "--seed", "1e30"), "--seed"),
        (("run", "{config}", "--bogus"), "--bogus"),
        (("run", "{config}", "--seed", "4294967296"), "between 0 and 4294967295"),
        (("run", "{config}", "--out", "{config}/below"), "below a file"),
        (("run", "{config}", "--out", "a" * 300), "too long"),
        (("run", "{config}", "--set", "train.epochs=1\ntrain.seed=2"), "one line"),
        (("run", "{config}", "--set", "model.name=mlp", "model.hidden=[0]"), "model.hidden.0"),
        (("run", "{config}", "--set", "method.learning_rat=1"), "'method.learning_rate'"),
        (("run", "{config}", "--set", "method.momentum=inf"), "method.momentum"),
        (("run", "{config}", "--set", "phase.step=3"), "phase.name"),
        (("run", "{config}", "--set", "data.folder=/nowhere"), "data.folder"),
        (("run", "{config}", "--set", "record.checkpoint_minutes=nan"), "checkpoint_minutes"),
        (("compare", "configs", "--seeds", "1000000000"), "31.7 years"),
        (("compare", "configs", "--jobs", "0", "--out", "c"), "--jobs must be at least 1"),
        (("tune", "{config}", "--seeds", "100000"), "100000 seeds would take 1.2 days"),
        (("suggest-rate", "{config}", "--steps", "-5"), "--steps must lie between 1 and"),
        (("suggest-rate", "{config}", "--starts", "nan", "1"), "--starts must be finite"),
        (("suggest-rate", "{config}", "--out", "{config}"), "overwrite it with --force"),
        (("theory", "{config}", "--out", "configs"), "overwrite it with --force"),
        (("watch", "configs"), "holds no run"),
    ],
)
def test_mistakes_are_one_line(config, capsys, arguments, wanted):
    words = [word.replace("{config}", config) for word in arguments]
    assert wanted in fails(capsys, *words).replace("Missing", "missing")
    assert not Path("runs").exists()


def test_a_grid_is_counted_before_it_is_built(config, capsys):
    keys = [f"tune.method.{name}=[{','.join(['1'] * 1000)}]" for name in ("b1", "b2", "eps")]
    keys = [key.replace("tune.", 'tune."', 1).replace("=", '"=', 1) for key in keys]
    shown = fails(capsys, "tune", config, "--set", "tune={}", *keys)
    assert "1000000000 points of the grid would take 31.7 years" in shown


@pytest.mark.slow
def test_two_searches_cannot_share_a_folder(config, capsys):
    cli.main(["tune", config, "--seeds", "1", "--out", "search"])
    with locked(Path("search")):
        shown = fails(capsys, "tune", config, "--seeds", "1", "--out", "search")
    assert "search is in use by another process (process " in shown


@pytest.mark.slow
def test_a_folder_that_was_deleted_ends_its_run(config, tmp_path):
    from optalr.experiments.errors import ExperimentError
    from optalr.experiments.training.loop import train
    from optalr.experiments.training.trainer import Trainer

    folder = RunFolder.create(tmp_path / "run", load_config(config))

    def move(row):
        (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(ExperimentError, match="was moved or deleted while its run was under way"):
        train(Trainer(folder.config()), folder, move)
    assert not (tmp_path / "run").exists()
    result = train(Trainer(load_config(config)), RunFolder(tmp_path / "moved"))
    assert result["status"] == "finished"


def test_suggestions_stay_in_their_section():
    keys = ["method.eps_root", "method.learning_rate", "train.epochs"]
    assert suggest("method.learning_rat", keys) == "did you mean 'method.learning_rate'?"
    assert suggest("epochs", keys) == "did you mean 'train.epochs'?"


@pytest.mark.slow
def test_without_its_extra_the_command_says_how_to_install_it(tmp_path):
    code = (
        "import sys; sys.modules['tyro'] = None; sys.argv = ['optalr', 'list'];"
        "from optalr_command import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == endings.EXIT_MISTAKE
    assert done.stderr.count("\n") == 1
    assert "pip install 'optalr[experiments]'" in done.stderr


def test_nothing_here_needs_one_system_alone():
    """What Windows lacks would keep the command from starting there."""
    unix = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
    used = {
        imported.module
        for module in package().values()
        for imported in imports(module.name)
        if imported.module in unix
    }
    assert not used


@pytest.mark.slow
def test_runs_side_by_side_are_those_one_after_another(config, tmp_path):
    repository = str(ROOT)
    words = [sys.executable, "-m", "optalr", "compare", "configs", "--seeds", "2"]
    for jobs in ("1", "2"):
        subprocess.run(
            [*words, "--jobs", jobs, "--out", f"out{jobs}"],
            check=True,
            env={"PYTHONPATH": repository, "PATH": "", "MPLBACKEND": "agg"},
        )
    for seed in (0, 1):
        results = [RunFolder(f"out{jobs}/runs/small-seed{seed}").result() for jobs in (1, 2)]
        one, two = ({k: v for k, v in r.items() if "seconds" not in k} for r in results)
        assert one == two


@pytest.mark.slow
def test_a_signal_stops_runs_side_by_side(config):
    import os
    import time

    repository = str(ROOT)
    words = ["compare", "configs", "--seeds", "2", "--set", "train.epochs=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "optalr", *words, "--jobs", "2", "--out", "out"],
        env={**os.environ, "PYTHONPATH": repository},
    )
    runs = [Path(f"out/runs/small-seed{seed}") for seed in (0, 1)]
    while not all((run / "checkpoints").exists() for run in runs):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    for run in runs:
        assert RunFolder(run).result() is None
        assert "which is saved" in (run / "output.txt").read_text()
