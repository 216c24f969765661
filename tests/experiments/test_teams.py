"""What processes tell each other, with threads in their place."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optalr.experiments.configs.config import from_table
from optalr.experiments.errors import ExperimentError
from optalr.experiments.joining import Processes
from optalr.experiments.processes import Team
from optalr.experiments.records import arrays, checkpoints
from optalr.experiments.records.onlooking import check_seen, made_in
from optalr.experiments.records.run_folder import RunFolder
from optalr.experiments.training.devices import make_mesh
from tests.experiments.refusing import fails
from tests.experiments.teams import together

HERE = "localhost:1"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--process", "0"], "need --coordinator HOST:PORT"),
        (["--processes", "2"], "need --coordinator HOST:PORT"),
        (["--coordinator", HERE], "needs --processes N and --process I"),
        (["--coordinator", HERE, "--processes", "2"], "needs --processes N and --process I"),
        (["--coordinator", HERE, "--process", "1"], "needs --processes N and --process I"),
        (["--coordinator", HERE, "--processes", "2", "--process", "2"], "from 0 to 1"),
        (["--coordinator", "here", "--processes", "2", "--process", "1"], "must be HOST:PORT"),
        (["--coordinator", "a:99999", "--processes", "2", "--process", "1"], "must be HOST:PORT"),
        (["--coordinator", "auto", "--process", "1"], "leave --processes and --process out"),
        (["--wait", "0"], "--wait must be at least 1 second"),
        (["--coordinator", "auto", "--dry-run"], "in one process"),
        (
            ["--coordinator", HERE, "--processes", "2", "--process", "1", "--wait", "1"],
            "nobody answers at --coordinator localhost:1 within 1 s",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, tmp_path, words, wanted):
    out = ["--out", str(tmp_path / "run")]
    assert wanted in fails(capsys, "run", "configs/digits/adam.toml", *out, *words)
    assert not (tmp_path / "run").exists()


def test_a_comparison_is_for_one_process(capsys, tmp_path):
    (tmp_path / "comparison.json").write_text("{}")
    several = ["--coordinator", HERE, "--processes", "2", "--process", "1"]
    assert "is a comparison" in fails(capsys, "resume", str(tmp_path), *several)


def test_an_address_of_ipv6_is_one():
    Processes("[::1]:1234", 2, 1).check()


@pytest.mark.parametrize(
    ("size", "batch", "wanted"),
    [
        (0, 64, "2 processes need a mesh to share batches over: pass --mesh data=8"),
        (5, 60, "mesh.data 5 is no multiple of 2 processes, .*: set it to 4"),
        (6, 64, "batch_size 64 is no multiple of mesh.data 6"),
        (16, 64, "needs 16 devices, .*device_count=8 in each process"),
    ],
)
def test_what_processes_cannot_share_is_refused(monkeypatch, size, batch, wanted):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ExperimentError, match=wanted):
        make_mesh(from_table({"mesh": {"data": size}}).mesh, batch)


def test_what_one_fails_with_all_fail_with():
    def act(team):
        with team.one_fate():
            if team.index == 1:
                raise ExperimentError("the disk is full")

    first, second = together(act)
    assert str(first) == "process 1: the disk is full"
    assert str(second) == "the disk is full"
    assert first.shared
    assert second.shared


def test_a_difference_is_named():
    def act(team):
        value = f"seed = 0\nrate = 0.{team.index}"
        team.check_same("their run", value, remedy="Give all the same.")

    for error in together(act):
        assert "differ in their run: 'rate = 0.0' and 'rate = 0.1'. Give all" in str(error)


def test_a_folder_that_one_process_does_not_see_is_refused(tmp_path):
    def act(team):
        own = tmp_path / f"{team.index}"
        own.mkdir()
        check_seen(team, own, patience=0.2)

    first, second = together(act)
    assert str(second).startswith(f"{tmp_path / '1'} is not the folder that process 0 writes")
    assert str(first) == f"process 1: {second}"


def test_the_first_makes_the_folder_and_the_other_only_reads_it(tmp_path):
    def act(team):
        folder = made_in(team, lambda: RunFolder.create(tmp_path / "run", from_table({})))
        with folder.lock():
            folder.append("metrics.jsonl", [{"step": 1}])
            return folder.path, team.writes

    assert together(act) == [(tmp_path / "run", True), (tmp_path / "run", False)]
    assert len(RunFolder(tmp_path / "run").rows("metrics.jsonl")) == 1
    assert not (tmp_path / "run" / ".seen").exists()


# Checkpoints.

STATE = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.bfloat16(2), "key": jax.random.key(3)}


def _save(path, step):
    return together(lambda team: checkpoints.Checkpoints(path, 2, team).save(step, STATE, {}))


def test_a_checkpoint_of_two_is_read_by_one(tmp_path):
    assert _save(tmp_path, 4) == [None, None]
    alone = checkpoints.Checkpoints(tmp_path, 2)
    assert alone.latest() == 4
    found, _ = alone.restore(4, STATE)
    for name in ("a", "b"):
        assert found[name].dtype == STATE[name].dtype
        np.testing.assert_array_equal(found[name], STATE[name])
    assert found["key"] == STATE["key"]


def test_a_checkpoint_of_which_one_part_is_lost_is_none(tmp_path):
    _save(tmp_path, 4)
    _save(tmp_path, 8)
    (tmp_path / "8" / "state-1-of-2.npz").unlink()
    assert checkpoints.Checkpoints(tmp_path, 2).latest() == 4


@pytest.mark.parametrize("index", [0, 1])
def test_a_save_that_fails_in_one_process_is_none(tmp_path, monkeypatch, index):
    _save(tmp_path, 4)
    write = checkpoints.write_arrays

    def failing(path, named):
        write(path, named)
        if f"-{index}-of" in path.name:
            raise OSError(28, "")

    monkeypatch.setattr(checkpoints, "write_arrays", failing)
    assert all("the disk is full" in str(error) for error in _save(tmp_path, 8))
    assert checkpoints.Checkpoints(tmp_path, 2).latest() == 4
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_a_part_that_the_first_does_not_see_is_named(tmp_path, monkeypatch):
    write = checkpoints.write_arrays
    elsewhere = tmp_path / "elsewhere"

    def hidden(path, named):
        write(path, named)
        if "-1-of" in path.name:
            shutil.copy(path, elsewhere)
            vanishing.append(path)

    vanishing = []
    sums = checkpoints.sums_of

    def summed(folder, names):
        text = sums(folder, names := list(names))
        # Only once the thread that wrote it has read it.
        for path in vanishing:
            if path.name in names:
                path.unlink(missing_ok=True)
        return text

    monkeypatch.setattr(checkpoints, "write_arrays", hidden)
    monkeypatch.setattr(checkpoints, "sums_of", summed)
    errors = _save(tmp_path / "run", 4)
    assert all("where all processes see the same files" in str(error) for error in errors)


def test_parts_of_an_array_are_put_together_wherever_they_shall_lie(tmp_path):
    whole = np.arange(96, dtype=np.float32).reshape(8, 12)
    name = "00000['w']"
    cuts = [(slice(0, 3), slice(None)), (slice(3, 8), slice(0, 7)), (slice(3, 8), slice(7, 12))]
    paths = [tmp_path / f"{i}.npz" for i in range(3)]
    for path, cut in zip(paths, cuts, strict=True):
        place = ",".join(str(part.start or 0) for part in cut)
        np.savez(path, **{f"{name}@{place}": whole[cut]})
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (P(), P("x"), P("x", "y"), P(None, ("x",))):
        like = jax.device_put(jnp.zeros((8, 12)), NamedSharding(mesh, spec))
        with arrays.StoredArrays(paths) as stored:
            found = stored.restored(name, like)
        assert found.sharding == like.sharding
        np.testing.assert_array_equal(found, whole)
    with arrays.StoredArrays(paths[:2]) as stored, pytest.raises(ValueError, match="in no file"):
        stored.restored(name, jnp.zeros((8, 12)))


def test_one_process_is_a_team():
    team = Team()
    assert team.writes
    assert team.largest(3, -1) == (3, -1)
    assert team.texts("x") == ["x"]
    with pytest.raises(ExperimentError, match="mine") as caught, team.one_fate():
        raise ExperimentError("mine")
    assert not caught.value.shared
