"""A run folder under disks that fail at every operation, and with a bit flipped in every file."""

import os
import shutil

import numpy as np
import pytest

from optalr.experiments.configs.files import load_config
from optalr.experiments.errors import ExperimentError
from optalr.experiments.records.run_folder import RunFolder
from optalr.experiments.training.loop import open_unfinished, train
from optalr.experiments.training.trainer import Trainer
from tests.experiments.records.faults import SMALL, Disk, Killed, snapshot


@pytest.fixture(scope="module", autouse=True)
def memory_disk():
    """Do not wait for the real disk, some thousand times: no test can cut its power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        yield


@pytest.fixture(scope="module")
def trainer():
    """Compile once for the hundreds of runs here."""
    return Trainer(SMALL)


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """Train without a fault; return the folder, what it left, and the operations that it took."""
    folder = tmp_path_factory.mktemp("whole")
    with Disk(folder).mounted() as disk:
        run = RunFolder.create(folder / "run", SMALL)
        train(trainer, run)
    return run.path, snapshot(trainer, run), disk.count


def _resume(trainer, path):
    folder = RunFolder.open(path) if path.exists() else RunFolder.create(path, SMALL)
    if folder.result() is None:
        train(trainer, folder)
    return folder


def _fail_and_resume(trainer, path, fails_at, kind):
    disk, message = Disk(path.parent, fails_at, kind), "the disk is full"
    try:
        with disk.mounted():
            train(trainer, RunFolder.create(path, SMALL))
    except ExperimentError as error:
        message = str(error)
    except Killed:
        message += " for good"
    # An operation that serves a message only may fail without an error.
    assert "the disk is full" in message
    assert disk.count >= fails_at
    return snapshot(trainer, _resume(trainer, path))


KINDS = ("once", "stays", "killed")


def test_every_forty_seventh_operation_may_fail(trainer, whole, tmp_path):
    _, wanted, count = whole
    assert count > 60
    for fails_at in range(1, count + 1, 47):
        kind = KINDS[fails_at // 47 % 3]
        path = tmp_path / f"{fails_at}" / "run"
        assert _fail_and_resume(trainer, path, fails_at, kind) == wanted, (kind, fails_at)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stride"), [("killed", 1), ("once", 3), ("stays", 3)])
def test_every_operation_may_fail(trainer, whole, tmp_path, kind, stride):
    _, wanted, count = whole
    for fails_at in range(1, count + 1, stride):
        path = tmp_path / f"{fails_at}" / "run"
        assert _fail_and_resume(trainer, path, fails_at, kind) == wanted, fails_at
        shutil.rmtree(path.parent)


@pytest.fixture(scope="module")
def unfinished(trainer, tmp_path_factory):
    """Return a run that was interrupted after its third epoch, before its last checkpoint."""

    def interrupt(row):
        if row["step"] == 6:
            raise KeyboardInterrupt

    config = SMALL
    folder = RunFolder.create(tmp_path_factory.mktemp("unfinished") / "run", config)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, folder, interrupt)
    return folder.path


def _flips(path, number=2):
    """Yield each file with the bits to flip in it, one at a time."""
    generator = np.random.default_rng(0)
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size):
        for place in generator.integers(0, 8 * file.stat().st_size, number):
            yield file.relative_to(path), int(place)


def _flip(file, place):
    content = bytearray(file.read_bytes())
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(bytes(content))


def _outcome(trainer, path):
    """Resume a run and return what it left, or None where it was refused."""
    try:
        config = load_config(path / "config.toml")
        # A bit of the config may make it another experiment, or none.
        trainer = trainer if config == SMALL else Trainer(config)
        return snapshot(trainer, _resume(trainer, path))
    except ExperimentError:
        return None


@pytest.mark.parametrize("number", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_no_flipped_bit_makes_a_silent_difference(
    trainer, whole, unfinished, tmp_path, caplog, number
):
    """Each is refused, or named in a warning, or makes no difference at all."""
    tried = set()
    for name, place in _flips(unfinished, number):
        copy = tmp_path / "copy"
        shutil.copytree(unfinished, copy)
        _flip(copy / name, place)
        caplog.clear()
        found = _outcome(trainer, copy)
        assert found == whole[1] or found is None or caplog.records, (name, place)
        shutil.rmtree(copy)
        tried.add(str(name))
    assert {"config.toml", "metrics.jsonl", "checkpoints/4/state.npz"} <= tried


def _read(path):
    """Read all that a finished run holds; return whether it was refused."""
    folder = RunFolder(path)
    try:
        folder.result()
        folder.rows("metrics.jsonl")
        folder.rows("evaluations.jsonl")
        folder.config()
        folder.environment()
    except ExperimentError:
        return True
    return False


def test_a_flipped_bit_of_a_finished_run_is_refused_or_named(whole, tmp_path, caplog):
    assert not _read(whole[0])
    assert not caplog.records
    for name, place in _flips(whole[0]):
        if name.parts[0] != "checkpoints":  # nothing reads these once a run is finished
            copy = tmp_path / "copy"
            shutil.copytree(whole[0], copy)
            _flip(copy / name, place)
            caplog.clear()
            assert _read(copy) or caplog.records, (name, place)
            shutil.rmtree(copy)


def test_the_newest_checkpoint_is_damaged(trainer, whole, unfinished, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(unfinished, copy)
    (copy / "checkpoints" / "4" / "state.npz").write_bytes(b"")
    folder = _resume(trainer, copy)
    assert snapshot(trainer, folder) == whole[1]
    assert "going on from step 2" in caplog.text
    assert (copy / "checkpoints" / "damaged-4").is_dir()


def test_no_checkpoint_is_intact(trainer, unfinished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(unfinished, copy)
    for step in (2, 4):
        _flip(copy / "checkpoints" / f"{step}" / "state.npz", 999)
    with pytest.raises(ExperimentError, match=r"no checkpoint is intact: .*delete .* and resume"):
        train(*open_unfinished(copy))
    shutil.rmtree(copy / "checkpoints")
    assert _resume(trainer, copy).result()["steps"] == 6


def test_a_renamed_checkpoint_is_not_believed(trainer, whole, unfinished, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(unfinished, copy)
    (copy / "checkpoints" / "4").rename(copy / "checkpoints" / "9999")
    assert snapshot(trainer, _resume(trainer, copy)) == whole[1]
    assert "was renamed (it is of step 4)" in caplog.text


def test_checkpoints_of_a_former_version_are_refused_in_one_line(trainer, unfinished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(unfinished, copy)
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints" / "4").mkdir(parents=True)
    (copy / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ExperimentError, match="of an earlier optalr, in Orbax's format"):
        _resume(trainer, copy)


def test_another_seed_is_refused(trainer, unfinished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(unfinished, copy)
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("\nseed = 0", "\nseed = 1"))
    with pytest.raises(ExperimentError, match=r"train\.seed: 0 -> 1"):
        _resume(trainer, copy)


def test_other_arithmetic_is_warned_of(trainer, unfinished, tmp_path, caplog, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(unfinished, copy)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    _resume(trainer, copy)
    assert "--xla_cpu_enable_fast_math=true" in caplog.text
    assert "the last bits will differ" in caplog.text


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (lambda lines: [], "0 of 4 rows"),
        (lambda lines: [*lines[:1], b"\xff\xfe{", *lines[2:]], "line 2 is damaged"),
        (lambda lines: [*lines[:1], *lines[2:]], "row 2 missing"),
        (lambda lines: [lines[0].replace(b"loss", b"lass"), *lines[1:]], "line 1 is damaged"),
    ],
)
def test_lost_rows_are_named(trainer, unfinished, tmp_path, caplog, content, wanted):
    copy = tmp_path / "copy"
    shutil.copytree(unfinished, copy)
    metrics = copy / "metrics.jsonl"
    metrics.write_bytes(b"\n".join(content(metrics.read_bytes().splitlines())) + b"\n")
    folder = _resume(trainer, copy)
    assert wanted in caplog.text
    result = folder.result()
    assert result is not None
    assert result["lost"]
    assert folder.rows("metrics.jsonl")[-1]["step"] == 6  # the later rows are there
