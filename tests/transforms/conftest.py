import jax.numpy as jnp
import numpy as np
import pytest

from tests.transforms.kronecker_layers import gram, moments


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def layer(rng):
    """A dense layer of 5 inputs and 3 outputs with its bias."""
    grads = {
        "kernel": jnp.asarray(rng.standard_normal((5, 3)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal(3), jnp.float32),
    }
    rows, cols = gram(rng, 5), gram(rng, 3, 1e-2)
    signals = {"kernel": moments(rows, cols, bias="['bias']"), "bias": None}
    return grads, signals, rows, cols
