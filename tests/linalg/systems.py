"""Symmetric systems of known spectrum, solved by MINRES, and SciPy's iterates for them."""

import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg

from optalr.linalg import minres


def symmetric(eigenvalues, seed=0):
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return (q * np.asarray(eigenvalues)) @ q.T


def scipy_iterates(A, b, steps, shift=0.0, M=None):
    iterates = []
    scipy.sparse.linalg.minres(
        A,
        b,
        rtol=0.0,
        shift=-shift,
        maxiter=steps,
        M=M,
        callback=lambda x: iterates.append(x.copy()),
    )
    return iterates


def solve(A, b, steps, **kwargs):
    return minres(lambda v: jnp.asarray(A) @ v, jnp.asarray(b), num_steps=steps, **kwargs)


DEFINITE = symmetric(np.geomspace(1e-1, 1e1, 10))
INDEFINITE = symmetric([-5.0, -1.0, -0.3, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 7.0])
SINGULAR = symmetric([0.0, 0.0, 0.0, -2.0, -0.5, 0.5, 1.0, 2.0, 3.0, 5.0])
RHS = np.random.default_rng(7).standard_normal(10)
