"""Known factors of a layer, and the Kronecker form that takes them at once."""

import jax.numpy as jnp

import optalr
from optalr.signals.moments import LayerMoments

# The factors as they are measured: no waiting, no bound, no approximation of the power.
BARE = optalr.KroneckerOptions(
    warmup=0, min_batches=1, max_update=None, spectrum="exact", damping_form="absolute"
)


def moments(rows, cols, count):
    rows, cols = jnp.asarray(rows, jnp.float32), jnp.asarray(cols, jnp.float32)
    zero = jnp.zeros(rows.shape[0])
    return LayerMoments(rows, cols, zero, None, jnp.float32(count), jnp.float32(1))
