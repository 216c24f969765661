"""The command line, in this process where that will do and in a fresh one where it must."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from optalr.experiments import cli, endings
from optalr.experiments.studies import compare
from tests.experiments.refusing import fails

SMALL = """
[data]
limit = 320
[model]
name = "linear"
[method]
name = "{name}"
learning_rate = 3e-3
[train]
epochs = 3
batch_size = 64
[tune]
"method.learning_rate" = [1e-2, 1e-5]
"""


def _write_configs(folder):
    (folder / "configs" / "small").mkdir(parents=True)
    for name in ("sgd", "adam"):
        (folder / "configs" / "small" / f"{name}.toml").write_text(SMALL.format(name=name))
    return Path("configs/small")


@pytest.fixture
def configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return _write_configs(tmp_path)


def test_set_may_be_repeated_and_take_several(configs, capsys):
    repeated = ["--set", "train.epochs=1", "--set", "train.batch_size=32", "train.seed=3"]
    cli.main(["run", str(configs / "sgd.toml"), *repeated, "--out", "out"])
    capsys.readouterr()
    written = Path("out/config.toml").read_text()
    assert all(line in written for line in ("epochs = 1\n", "batch_size = 32\n", "seed = 3\n"))


def test_run_then_run_again_then_plot(configs, capsys):
    cli.main(["run", str(configs / "adam.toml")])
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "runs/small-adam-seed0" in shown
    Path("runs/small-adam-seed0/curves.png").unlink()
    cli.main(["plot", "runs/small-adam-seed0"])
    assert Path("runs/small-adam-seed0/curves.png").exists()
    cli.main(["run", str(configs / "adam.toml"), "--seed", "0", "--set", "train.epochs=1"])
    assert Path("runs/small-adam-seed0-2/result.json").exists()
    cli.main(["export", "runs/small-adam-seed0", "--tensorboard"])
    assert Path("runs/small-adam-seed0/metrics.csv").read_text().count("\n") == 16
    assert list(Path("runs/small-adam-seed0/tensorboard").glob("events.*"))


class Interrupted(NamedTuple):
    """A comparison of two configs and two seeds that was interrupted in its third run.

    Attributes:
      folder: the working directory.
      exit_code: of the interrupted command.
      num_trained: trainings begun when interrupted, after drawing what was there, and in the end.
      partial: what the drawing printed.
      final: what the resumed command printed.
    """

    folder: Path
    exit_code: int | str | None
    num_trained: tuple[int, int, int]
    partial: str
    final: str


def _shown(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        cli.main(arguments)
    return output.getvalue()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Compare once for all tests that look at what a comparison leaves."""
    folder = tmp_path_factory.mktemp("compared")
    original, count = compare.train, 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        configs = _write_configs(folder)
        patch.setattr(compare, "train", interrupted)
        with pytest.raises(SystemExit) as caught:
            cli.main(["compare", str(configs), "--seeds", "2"])
        before = count
        partial = _shown("plot", "runs/compare-small")
        drawn = count
        final = _shown("resume", "runs/compare-small")
    return Interrupted(folder, caught.value.code, (before, drawn, count), partial, final)


def test_an_interrupted_comparison_goes_on(comparison):
    assert comparison.exit_code == 130
    assert "sgd (0 of 2 seeds)" in comparison.partial  # what is there so far
    # Two before, the one cut short, and the two that were left.
    assert comparison.num_trained == (3, 3, 5)
    assert (comparison.folder / "runs/compare-small/report.html").exists()


def test_compare_writes_table_picture_and_page(comparison, capsys, monkeypatch):
    monkeypatch.chdir(comparison.folder)
    assert "±" in comparison.final
    out = Path("runs/compare-small")
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "src='http" not in page
    assert "limit = 320" in page
    for picture in ("curves.png", "losses.png", "rates.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert (out / "table.csv").read_text().count("\n") == 3
    assert (out / "runs.csv").read_text().count("\n") == 5
    cli.main(["plot", str(out), "--configs", "sgd", "--out", "sgd.png"])
    assert Path("sgd.png").read_bytes().startswith(b"\x89PNG")
    assert "no config 'sdg': did you mean 'sgd'" in fails(
        capsys, "plot", str(out), "--configs", "sdg"
    )


def test_a_diverged_method_stands_in_the_table(configs, capsys):
    (configs / "wild.toml").write_text(SMALL.format(name="sgd").replace("3e-3", "1e38"))
    cli.main(["compare", str(configs), "--seeds", "1"])
    assert "diverged" in capsys.readouterr().out
    lines = Path("runs/compare-small/runs.csv").read_text().splitlines()
    assert [line.split(",")[2] for line in lines[1:]] == ["finished", "finished", "diverged"]


def test_tune_names_the_best_point_and_goes_on_where_it_was(configs, capsys):
    cli.main(["tune", str(configs / "adam.toml"), "--seeds", "1"])
    first = capsys.readouterr().out
    assert "best: method.learning_rate=0.01" in first
    assert "learning_rate = 0.01" in Path("runs/tune-small-adam/best.toml").read_text()
    cli.main(["tune", str(configs / "adam.toml"), "--seeds", "1"])
    assert capsys.readouterr().out == first
    fails(capsys, "tune", str(configs / "adam.toml"), "--seeds", "2")


def test_names_are_listed(capsys):
    cli.main(["list"])
    shown = capsys.readouterr().out
    for name in ("digits", "mlp", "adam", "cosine"):
        assert name in shown


def test_mistakes_are_one_line(configs, capsys):
    adam = str(configs / "adam.toml")
    assert "did you mean" in fails(capsys, "run", "configs/small/adamm.toml")
    assert "train.epochs" in fails(capsys, "run", adam, "--set", "train.epoch=2")
    assert "batch_size" in fails(capsys, "run", adam, "--set", "train.batch_size=9999")
    assert "holds no run" in fails(capsys, "resume", "configs")
    assert "no folder" in fails(capsys, "compare", "nowhere")
    assert "--target" in fails(capsys, "compare", str(configs), "--target", "inf")
    assert "holds no .toml" in fails(capsys, "compare", "configs")
    assert "--seeds" in fails(capsys, "compare", str(configs), "--seeds", "0")
    assert "no [tune] section" in fails(capsys, "tune", adam, "--set", "tune={}")
    assert "not overwritten" in fails(capsys, "run", adam, "--out", "configs")
    assert not Path("runs").exists()


def test_a_method_without_its_extra_is_a_mistake(configs, capsys, monkeypatch):
    import optax

    def needs_more(learning_rate):
        def update(updates, state, params=None, *, sharpness, **extras):
            return updates, state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    monkeypatch.setattr(optax, "needs_more", needs_more, raising=False)
    shown = fails(capsys, "run", str(configs / "adam.toml"), "--set", "method.name=needs_more")
    assert "needs_more" in shown
    assert "sharpness" in shown
    assert not Path("runs").exists()


def test_differing_data_are_not_compared(configs, capsys):
    (configs / "other.toml").write_text("[data]\nlimit = 100\n")
    assert "[data]" in fails(capsys, "compare", str(configs))


def test_a_divergence_has_an_exit_code_of_its_own(configs, capsys):
    arguments = ["run", str(configs / "sgd.toml"), "--set", "method.learning_rate=1e38"]
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == endings.EXIT_DIVERGED
    assert "diverged at step" in capsys.readouterr().err


def test_python_dash_m(configs):
    repository = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-m", "optalr", "run", "missing.toml"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == endings.EXIT_MISTAKE
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_suggest_rate(configs, capsys):
    arguments = ["suggest-rate", str(configs / "sgd.toml"), "--steps", "24"]
    cli.main([*arguments, "--starts", "1e-3", "1e-1", "--set", "train.weight_decay=1e-3"])
    shown = capsys.readouterr().out
    assert "suggest" in shown
    assert Path("runs/rate-small-sgd.png").exists()
    assert "starts" in fails(capsys, *arguments, "--starts", "0.1")


def test_a_method_may_probe_the_validation_examples(configs, capsys):
    text = SMALL.format(name="learned_rate_sgd").replace("learning_rate = 3e-3", "")
    extra = 'initial_rate = 0.01\nprobe = "validation_value_fn"\n[train]'
    (configs / "probing.toml").write_text(text.replace("[train]", extra))
    cli.main(["run", str(configs / "probing.toml")])
    assert "accuracy" in capsys.readouterr().out


def test_the_untuned_recipe_gets_the_length_of_the_run_and_validation_batches(configs):
    text = SMALL.format(name="untuned").replace("learning_rate = 3e-3", "")
    (configs / "untuned.toml").write_text(text.split("[tune]")[0])
    cli.main(["run", str(configs / "untuned.toml")])
    lines = Path("runs/small-untuned-seed0/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rates = [row["learning_rate"] for row in rows]
    assert rates[-1] < 0.02 * max(rates)  # a cosine that ends with the run
    assert len({row["weight_decay"] for row in rows}) > 1
