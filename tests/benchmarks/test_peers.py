"""The bench of the peers: budgets, what a worker stores, how children end, what the page says."""

import json
import pathlib
import re
import subprocess
import sys
import time

import pytest

from benchmarks import peers
from benchmarks.peers_parts import children, environments, report, worker
from benchmarks.peers_parts.methods import METHODS, Entry
from benchmarks.untuned_parts.problems import PROBLEMS
from benchmarks.untuned_parts.running import NUM_GRID_POINTS, NUM_POINTS
from benchmarks.untuned_parts.storing import Store, final
from tests.benchmarks.untuned_runs import method as tiny
from tests.benchmarks.untuned_runs import record

BUDGET = 12
PINNED = re.compile(r"^[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+$")


class FakePeer:
    """Ends the lower the nearer its rate is to 0.3; counts its runs."""

    grid = ({"rate": 0.1}, {"rate": 0.3}, {"rate": 1.0})
    points = (NUM_POINTS, NUM_GRID_POINTS)

    def __init__(self, error=None):
        self.error, self.made = error, []

    def run(self, numbers, *, seed, num_points):
        self.made.append((numbers["rate"], seed, num_points))
        if self.error:
            raise self.error
        run = record([2.0, 1.0 + abs(numbers["rate"] - 0.3)], numbers=numbers, seed=seed)
        costs = {"processor_seconds": 4.0, "compile_seconds": 7.0, "state_bytes": 2048}
        return {**{k: run[k] for k in ("curve", "seconds")}, **costs}


def request(folder, **changes):
    given = {"problem": "digits_mlp", "method": "fake", "seeds": [0, 1], "folder": str(folder)}
    return worker.Request(**{**given, "made_by": {"code": "abc", "jax": "1.2"}, **changes})


def test_every_method_has_the_same_budget_and_a_pinned_environment():
    budgets = {name: len(method.grid) for name, method in METHODS.items()}
    assert budgets.pop("untuned") == 1
    assert set(budgets.values()) == {BUDGET}
    assert {method.environment for method in METHODS.values()} == set(environments.ENVIRONMENTS)
    for wanted in environments.ENVIRONMENTS.values():
        assert all(PINNED.match(package) for package in wanted)
        assert wanted[: len(environments.JAX)] == environments.JAX
    lines = environments.CONSTRAINTS.read_text().splitlines()
    assert all(PINNED.match(line) for line in lines)
    names = {line.partition("==")[0].lower() for line in lines}
    assert {name.lower() for name in environments.DATA} <= names


def test_all_names_every_problem_and_no_name_the_four_that_the_page_calls_default():
    assert peers.parse(["--problems", "all"]).problems == list(PROBLEMS)
    assert peers.parse(["--problems", "digits_mlp"]).problems == ["digits_mlp"]
    assert tuple(peers.parse([]).problems) == peers.DEFAULT
    page = (peers.ROOT / "docs" / "peers.md").read_text()
    assert re.search(r"^python benchmarks/peers.py +# the four default problems", page, re.M)
    assert re.search(r"^python benchmarks/peers.py --problems all +# all ten", page, re.M)
    assert (len(peers.DEFAULT), len(PROBLEMS)) == (4, 10)


def test_a_request_is_read_as_it_was_written(tmp_path):
    asked = request(tmp_path)
    asked.write(tmp_path / "request.json")
    assert worker.Request.read(tmp_path / "request.json") == asked
    assert json.loads((tmp_path / "request.json").read_text())["method"] == "fake"


def test_a_worker_tries_the_grid_and_then_runs_what_was_chosen_on_every_seed(tmp_path):
    peer = FakePeer()
    worker.work(request(tmp_path), peer)
    grid = [(rate, 0, NUM_GRID_POINTS) for rate in (0.1, 0.3, 1.0)]
    assert peer.made == [*grid, (0.3, 0, NUM_POINTS), (0.3, 1, NUM_POINTS)]
    runs = list(Store("digits_mlp", tmp_path).runs.values())
    # Only the first run of a process compiles and fills its memory.
    assert ["compile_seconds" in run for run in runs] == [True, False, False, False, False]
    assert ["peak_bytes" in run for run in runs] == [True, False, False, False, False]
    assert {run["code"] for run in runs} == {"abc"}


def test_a_worker_goes_on_where_it_was(tmp_path):
    worker.work(request(tmp_path, seeds=[0]), FakePeer())
    peer = FakePeer()
    worker.work(request(tmp_path), peer)
    assert peer.made == [(0.3, 1, NUM_POINTS)]
    worker.work(request(tmp_path), peer)
    assert len(peer.made) == 1


def test_a_method_that_cannot_run_is_stored_with_what_it_said_and_not_tried_again(tmp_path):
    for peer in (FakePeer(ValueError("no such layer\nand more")), FakePeer()):
        worker.work(request(tmp_path), peer)
    assert peer.made == []
    runs = Store("digits_mlp", tmp_path).runs.values()
    assert {run["error"] for run in runs} == {"ValueError: no such layer"}
    assert {run["num_points"] for run in runs} == {NUM_POINTS, NUM_GRID_POINTS}


def script(folder, text):
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def fake_entry(name="fake"):
    return Entry(name, name, tiny(name).build, FakePeer.grid)


def start(tmp_path, monkeypatch, text, *, deadline=float("inf")):
    """Run a child whose python is a script."""
    python = script(tmp_path, text)
    monkeypatch.setattr(environments, "make", lambda name, where: python)
    children.run(request(tmp_path / "runs"), fake_entry(), tmp_path, deadline=deadline)
    return list(Store("digits_mlp", tmp_path / "runs").runs.values())


def test_a_child_gets_its_request_and_one_core(tmp_path, monkeypatch):
    text = f"""import os, pathlib, sys
found = pathlib.Path(sys.argv[-1]).read_text(), os.environ["XLA_FLAGS"], sys.argv[1:3]
pathlib.Path({str(tmp_path / "seen")!r}).write_text(repr(found))
"""
    assert start(tmp_path, monkeypatch, text) == []
    asked, flags, module = eval((tmp_path / "seen").read_text())
    assert worker.Request(**json.loads(asked)) == request(tmp_path / "runs")
    assert "intra_op_parallelism_threads=1" in flags
    assert module == ["-m", "benchmarks.peers_parts.worker"]


def test_a_child_that_dies_is_stored_as_a_failure(tmp_path, monkeypatch):
    runs = start(tmp_path, monkeypatch, "raise SystemExit(3)")
    assert {run["error"] for run in runs} == {"ChildProcessError: its process ended with 3"}


def test_a_child_is_ended_at_the_deadline_and_nothing_is_stored(tmp_path, monkeypatch):
    begin = time.monotonic()
    text = "import time; time.sleep(60)"
    assert start(tmp_path, monkeypatch, text, deadline=begin + 0.2) == []
    assert time.monotonic() - begin < 30


def test_an_interruption_ends_the_child(tmp_path, monkeypatch):
    child = subprocess.Popen([script(tmp_path, "import time; time.sleep(60)")])
    with monkeypatch.context() as patched:
        # The first wait is what an interruption meets.
        waits = iter([KeyboardInterrupt()])
        whole = child.wait

        def wait(timeout=None):
            for error in waits:
                raise error
            return whole(timeout)

        patched.setattr(child, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            children.wait(child, float("inf"))
    assert child.poll() is not None


def test_an_environment_is_made_once_and_anew_for_other_versions(tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append([str(part) for part in command])
        if "venv" in commands[-1]:
            pathlib.Path(command[-1]).mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        environments.make("kfac", tmp_path)
    assert len(commands) == 2
    assert "kfac-jax==0.0.8" in commands[1]
    monkeypatch.setitem(environments.ENVIRONMENTS, "kfac", ("kfac-jax==0.0.9",))
    environments.make("kfac", tmp_path)
    assert len(commands) == 4


def test_a_peer_that_does_not_install_says_why(tmp_path, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "a line\nERROR: no matching version\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(environments.InstallError, match="no matching version"):
        environments.make("kfac", tmp_path)
    children.run(request(tmp_path), fake_entry(), tmp_path, deadline=float("inf"))
    runs = list(Store("digits_mlp", tmp_path).runs.values())
    assert "no matching version" in runs[0]["error"]
    assert final(runs[0])[0] == 0


# The page.


def stored(folder):
    """Store ours, an Adam that is better, and a peer that failed."""
    store = Store("digits_mlp", folder)
    made = {"processor_seconds": 3.0, "code": "abc", "jax": "1.2", "machine": "here", "load": 1.0}
    for rate, loss in ((0.1, 0.5), (0.2, 0.7), (0.3, 0.9)):
        run = record([2.0, loss], numbers={"rate": rate}, num_points=NUM_GRID_POINTS, **made)
        store.add({**run, "compile_seconds": 5.0, "state_bytes": 3072, "peak_bytes": 2**21})
    for seed in range(3):
        store.add(record([2.0, 0.5], numbers={"rate": 0.1}, seed=seed, **made))
        store.add(record([2.0, 1.0], method="untuned", seed=seed, score=0.95, **made))
    worker.work(request(folder, method="peer"), FakePeer(TypeError("too old a jax")))


def entries():
    grid = tuple({"rate": rate} for rate in (0.1, 0.2, 0.3))
    plain = {name: tiny(name) for name in ("adam", "untuned", "peer")}
    grids = {"adam": grid, "untuned": ({},), "peer": FakePeer.grid}
    return {n: Entry(n, n, plain[n].build, grids[n]) for n in plain} | {"absent": fake_entry()}


def test_the_page_shows_costs_losses_and_failures(tmp_path):
    stored(tmp_path)
    page = report.page(tmp_path, entries())
    rows = [line for line in page.splitlines() if line.startswith(("| `adam`", "| `untuned`"))]
    in_problem = rows[-3:-1]
    adam = "| `adam` | rate 0.1† | 0.500 ± 0 | 90.0 ± 0.0 | 100 % | 30 | 3 | 5 | 8 | 10 | 3 | 2 |"
    assert in_problem[0] == adam
    assert in_problem[1].startswith("| `untuned` | nothing | 1.00 ± 0 | 95.0 ± 0.0 | never |")
    assert "* digits_mlp, `untuned`: in loss to `adam`." in page
    assert "`peer` did not run: TypeError: too old a jax" in page
    assert "Not measured: `absent`." in page
    assert "| `adam` | 2.00 |" in page
    assert "| over | digits_mlp |" in page


def test_the_page_goes_on_without_runs(tmp_path):
    assert "nothing to report" in report.write(tmp_path / "runs")
    assert not (tmp_path / "runs.md").exists()
