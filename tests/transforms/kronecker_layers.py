"""Layers with known factors, for the tests of the Kronecker form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optalr.signals.coverage import Coverage, LeafTreatment
from optalr.signals.moments import LayerMoments
from optalr.transforms.kronecker.transform import KroneckerOptions

# No waiting and no bound: the arithmetic alone.
BARE = KroneckerOptions(warmup=0, min_batches=1, max_update=None)
N = 32


def gram(rng, size, scale=1.0):
    factor = rng.standard_normal((2 * size, size))
    return scale * factor.T @ factor / (2 * size)


def moments(rows, cols, count=N, bias=None, positions=1, mean=None):
    rows, cols = jnp.asarray(rows, jnp.float32), jnp.asarray(cols, jnp.float32)
    mean = jnp.zeros(rows.shape[:-1], jnp.float32) if mean is None else jnp.asarray(mean)
    return LayerMoments(
        rows, cols, mean, None, jnp.float32(count), jnp.float32(positions), bias=bias
    )


def power_of(matrix, power):
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return (vectors * values**power) @ vectors.T


def relative(matrix, damping):
    return matrix + damping * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


@functools.cache
def jitted(update):
    return jax.jit(lambda grads, state, extras: update(grads, state, **extras))


def run(tx, grads, signals, state=None):
    """One jitted update."""
    state = tx.init(grads) if state is None else state
    extras = {} if signals is None else {"signals": signals}
    return jitted(tx.update)(grads, state, extras)


def layout_of(*leaves):
    return Coverage(tuple(LeafTreatment(*leaf) for leaf in leaves))
