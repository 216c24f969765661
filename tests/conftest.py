"""Settings for every test: strict rank promotion, simulated devices, programs compiled quickly."""

import os

from tests import xla_flags

# Read when jax starts its backend, so it must stand before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["XLA_FLAGS"] = xla_flags.with_defaults(os.environ.get("XLA_FLAGS", ""))

import jax
import pytest

from tests.references import enable_x64

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Switch float64 on for one test."""
    with enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Give back what a module compiled: a whole run would otherwise hold gigabytes of programs."""
    yield
    jax.clear_caches()
