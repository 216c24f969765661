"""Sequences of gradients, and the methods that they are fed to."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from optalr import scale_by_block_diagonal, scale_by_full_matrix
from tests.transforms.compiling import quick_jit

ALL = pytest.mark.parametrize(
    "tx",
    [scale_by_block_diagonal(), scale_by_full_matrix(), scale_by_full_matrix(window=2)],
    ids=["block", "full", "window"],
)
BOTH = pytest.mark.parametrize("method", [scale_by_block_diagonal, scale_by_full_matrix])


def power_of(matrix, power):
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return (vectors * values**power) @ vectors.T


@functools.cache
def jitted(update):
    return quick_jit(update)


def trajectory(tx, grads):
    """Return the updates for a sequence of gradients, and the last state."""
    state, updates = tx.init(grads[0]), []
    for g in grads:
        update, state = jitted(tx.update)(g, state)
        updates.append(update)
    return updates, state


def sequence(shape, length, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(length)]
