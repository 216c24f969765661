"""The errors of the methods beside eigh's, backward and forward."""

import numpy as np
import pytest

from optalr.linalg import inverse_root
from tests.linalg.root_methods import METHODS, backward_error, relative_error
from tests.references import dense_inverse_root, random_spd


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_cholesky_polar_is_at_least_as_accurate_as_eigh(condition):
    matrix = random_spd(0, 128, condition)
    exact = dense_inverse_root(matrix)
    results = {name: inverse_root(matrix, **METHODS[name]) for name in ("eigh", "polar")}
    assert not results["polar"].fell_back
    errors = {name: relative_error(result.root, exact) for name, result in results.items()}
    assert errors["polar"] <= errors["eigh"]
    backward = {name: backward_error(matrix, result.root) for name, result in results.items()}
    assert backward["polar"] <= backward["eigh"]


def damped_stack(rows, condition, spectrum, count=3):
    """Return matrices whose rounding to float32 leaves no eigenvalue of the wrong sign."""
    if spectrum == "thin":  # a factor estimated from few examples, and damping
        thin = np.random.default_rng(0).standard_normal((count, rows, rows // 4))
        stack = thin @ np.swapaxes(thin, -1, -2) / rows
        damping = np.linalg.norm(stack, 2, axis=(-2, -1)) / condition
    else:
        stack = np.stack(
            [random_spd(seed, rows, condition, spectrum=spectrum) for seed in range(count)]
        )
        damping = np.full(count, 2 / condition)
    return (stack + damping[:, None, None] * np.eye(rows)).astype(np.float32)


@pytest.mark.parametrize("name", ["newton2", "newton3", "polar"])
def test_backward_error_is_no_larger_than_eighs(name):
    cells = [(c, s) for c in (1e2, 1e4, 1e6, 1e8) for s in ("geometric", "clustered", "thin")]
    stack = np.concatenate([damped_stack(64, *cell) for cell in cells])
    errors = []
    for method in (name, "eigh"):
        roots = inverse_root(stack, **METHODS[method]).root
        each = [backward_error(matrix, root) for matrix, root in zip(stack, roots, strict=True)]
        errors.append(np.mean(np.reshape(each, (len(cells), -1)), 1))
    worse = [cell for cell, own, eigh in zip(cells, *errors, strict=True) if own > eigh]
    assert not worse


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_what_auto_takes_has_no_larger_backward_error_than_eigh(rows, condition):
    stack = np.stack([random_spd(seed, rows, condition) for seed in range(8)])
    stack = stack + np.float32(2 / condition) * np.eye(rows, dtype=np.float32)
    eigh, auto = (inverse_root(stack, method=method).root for method in ("eigh", "auto"))
    errors = [
        np.mean([backward_error(matrix, root) for matrix, root in zip(stack, roots, strict=True)])
        for roots in (eigh, auto)
    ]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("n", [128, pytest.param(512, marks=pytest.mark.slow)])
def test_cholesky_polar_beats_eigh_at_low_rank_plus_damping(n):
    # Condition 2e7: what a factor estimated from few examples looks like.
    rng = np.random.default_rng(0)
    thin = rng.standard_normal((n, n // 4))
    matrix = thin @ thin.T / (n // 4)
    matrix = (matrix + np.linalg.norm(matrix, 2) / 2e7 * np.eye(n)).astype(np.float32)
    exact = dense_inverse_root(matrix)
    errors = [
        relative_error(inverse_root(matrix, **METHODS[name]).root, exact)
        for name in ("polar", "eigh")
    ]
    assert errors[0] <= errors[1]
