"""Starting processes that find each other on this machine."""

import os
import pathlib
import socket

import jax

from tests import xla_flags
from tests.sharding.process import LOCAL_DEVICES

ROOT = pathlib.Path(__file__).parents[2]


def free_port():
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def environment(num_devices=LOCAL_DEVICES):
    """Return the environment of a process with so many simulated devices."""
    return {
        **os.environ,
        "XLA_FLAGS": xla_flags.with_defaults(f"--{xla_flags.DEVICES}={num_devices}"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # The programs that a test's room keeps, where it keeps any.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
