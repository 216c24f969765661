"""The eigenvalues of the Kronecker factors in a state."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optalr.signals.coverage import Coverage
from optalr.states import check_opt_state, unboxed
from optalr.transforms.kronecker.leaves import Kernel, plan_leaves
from optalr.transforms.kronecker.options import KroneckerOptions, resolve_options
from optalr.transforms.kronecker.transform import KroneckerState


def factor_spectra(
    opt_state: Any,
    params: Any = None,
    *,
    layout: Coverage | None = None,
    options: KroneckerOptions | Mapping[str, Any] | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the eigenvalues of every pair of Kronecker factors in a state.

    Choose it to see what there is to precondition, and what damping does to it.

    Args:
      opt_state: an optimizer state that holds that of ``scale_by_kronecker``, at any depth.
      params: the parameters, or their shapes. Needed where factors are kept in blocks. Without them
        only the shapes of the factors say what these are. Blocks then look like layers in a stack,
        and the padding of the last block looks like an eigenvalue. Stacked diagonals look like
        whole factors if both sides have as many rows as there are layers and are symmetric.
      layout: what ``scale_by_kronecker`` got, read with ``params``.
      options: what ``scale_by_kronecker`` got, read with ``params``.

    Returns:
      A dict from each kernel's key path to two arrays ``(*stack, size)``: the eigenvalues, rising,
      of the rows' and the columns' factor, from the bias-corrected moving averages. A factor kept
      as a diagonal gives its entries. One kept in blocks gives, with ``params``, the eigenvalues of
      all blocks. The dict is empty before the first measurement.

    Raises:
      ValueError: the state was not made for ``params`` with ``layout`` and ``options``.

    Cost: an eigenvalue computation per factor, outside ``jit``.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> tx = optalr.scale_by_kronecker(statistics="gradient")
      >>> _, state = tx.update({"w": jnp.diag(jnp.array([3.0, 1.0]))}, tx.init({"w": jnp.eye(2)}))
      >>> [float(x) for x in optalr.factor_spectra(state)["['w']"][0].round(4)]
      [1.0, 9.0]
    """
    check_opt_state(opt_state)
    plans = None
    if params is not None:
        planned = plan_leaves(params, layout, resolve_options(options))
        # Factors stand without the boxes that parameters may be in.
        bare = jax.tree_util.tree_leaves_with_path(unboxed(params))
        names = [jax.tree_util.keystr(path) for path, _ in bare]
        plans = {
            name: plan
            for name, plan in zip(names, planned, strict=True)
            if isinstance(plan, Kernel)
        }
    found = {}
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, KroneckerState))
    for state in (node for node in nodes if isinstance(node, KroneckerState)):
        weight = float(state.weight)
        if weight == 0:
            continue
        rows = jax.tree_util.tree_flatten_with_path(state.memory.rows.factor)[0]
        cols = jax.tree.leaves(state.memory.cols.factor)
        for (path, row), col in zip(rows, cols, strict=True):
            name = jax.tree_util.keystr(path)
            row, col = (np.asarray(x, np.float64) / weight for x in (row, col))
            if plans is None:
                found[name] = _eigenvalues(row, col), _eigenvalues(col, row)
            else:
                found[name] = _planned_eigenvalues(name, plans.get(name), factors=(row, col))
    return found


def _eigenvalues(factor: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the eigenvalues of a factor; the shapes of both sides show how it is kept."""
    return np.sort(factor, -1) if _is_diagonal(factor, other) else np.linalg.eigvalsh(factor)


def _is_diagonal(factor: np.ndarray, other: np.ndarray) -> bool:
    if factor.ndim < 2 or factor.shape[-1] != factor.shape[-2]:
        return True
    # Both sides have the same stack axes, after which a diagonal has 1 axis and a matrix 2.
    missing = other.ndim - factor.ndim
    if missing == 1:
        return factor.shape[:-1] == other.shape[:-2]
    tolerance = np.finfo(np.float32).eps * factor.shape[-1] * np.abs(factor).max()
    symmetric = np.allclose(factor, np.swapaxes(factor, -1, -2), rtol=0, atol=tolerance)
    return missing > 1 or (missing == 0 and not symmetric)


def _planned_eigenvalues(
    name: str, plan: Kernel | None, *, factors: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues of both factors of a leaf whose storage is known."""
    wanted = [(*plan.stack, *side.shape) for side in plan.sides] if plan is not None else []
    got = [factor.shape for factor in factors]
    if plan is None or wanted != got:
        raise ValueError(
            f"params, layout and options tell of other factors for {name} than opt_state has: "
            f"{wanted} against {got}. Pass what scale_by_kronecker got."
        )
    rows, cols = (side.holding(factor) for side, factor in zip(plan.sides, factors, strict=True))
    return rows.eigenvalues(), cols.eigenvalues()
