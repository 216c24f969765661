"""Runs side by side, with processes that do nothing."""

import signal

import pytest

from optalr.experiments.records.signals import Interruption
from optalr.experiments.studies import parallel


class Child:
    """A process that takes a while to save what it has, once it is asked to stop."""

    def __init__(self):
        self.asked, self.looks = 0, 0

    def terminate(self):
        self.asked += 1

    def poll(self):
        if not self.asked:
            signal.raise_signal(signal.SIGTERM)
            return None
        self.looks += 1
        return 143 if self.looks > 5 else None


def test_a_signal_reaches_a_run_once(monkeypatch, tmp_path):
    """A second one would end it before its checkpoint is written."""
    children = []

    def start(*_):
        children.append(Child())
        return children[-1]

    monkeypatch.setattr(parallel, "_start", start)
    monkeypatch.setattr(parallel, "_LOOK_SECONDS", 0.0)
    with pytest.raises(Interruption):
        parallel.resume_side_by_side([tmp_path / "a", tmp_path / "b"], 1, lambda text: None)
    assert [child.asked for child in children] == [1]
