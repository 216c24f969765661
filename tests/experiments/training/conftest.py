"""Processes that are killed and signalled."""

import multiprocessing
from pathlib import Path

import jax
import pytest


@pytest.fixture
def processes(monkeypatch):
    """Give a context whose processes are forked from one that has imported everything already."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    # The tests' cached programs let a process get to its training within seconds.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optalr.experiments.commands", "sklearn.datasets"])
    return context
