"""The methods of inverse_root with their options, and how far a root is from the exact one."""

import numpy as np
import pytest

METHODS = {
    "eigh": {"method": "eigh"},
    "newton2": {"method": "coupled_newton", "order": 2},
    "newton3": {"method": "coupled_newton", "order": 3},
    "polar": {"method": "cholesky_polar"},
}


def every_method(function):
    return pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)(function)


def relative_error(root, exact):
    return np.linalg.norm(np.asarray(root, np.float64) - exact) / np.linalg.norm(exact)


def backward_error(matrix, root):
    """Return ``‖X⁻² − A‖/‖A‖`` in float64."""
    inverse = np.linalg.inv(np.asarray(root, np.float64))
    return np.linalg.norm(inverse @ inverse - matrix) / np.linalg.norm(matrix)
