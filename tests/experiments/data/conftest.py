"""Tests of data see no files but their own."""

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Hide the folders in which data would be looked for beside those that a test names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPTALR_DATA", raising=False)
