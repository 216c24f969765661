"""Captured Kronecker factors as the preconditioner of an iterative solve."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval, require_extra
from optalr.linalg.kronecker import apply_eigenbasis_power, mean_eigenvalue
from optalr.linalg.roots.bases import EigenBasis, eigenbasis
from optalr.signals.moments import Coverage, LayerMoments, LeafView, default_view, is_moments


def kronecker_preconditioner(
    *, relative_damping: float = 1e-2, layout: Coverage | None = None
) -> Callable[[dict[str, Any], Any], Callable[[Any], Any]]:
    """Build ``r ↦ (B ⊗ A + λI)⁻¹ r`` from the signals of the current batch.

    Choose it as ``preconditioner=`` of ``scale_by_krylov_flow`` where MINRES needs many steps
    because the layers' scales differ widely, and two eigendecompositions a layer and step are
    affordable. Biases take ``(B + λI)⁻¹`` of their layer; leaves without a layer are divided by the
    mean curvature of the others. Where nothing was captured it is the identity.

    Args:
      relative_damping: added to λ in units of the factors' mean eigenvalues, at least 0; keeps
        a rank-deficient estimate from amplifying what one batch has not seen.
      layout: what ``optalr.coverage(loss_fn, params, *args)`` returned; needed where a kernel is
        not a matrix split before its last axis.

    Returns:
      ``build(extras, damping) -> (r -> M r)``.

    Raises:
      TypeError: when built without ``signals`` among the extras.
      ValueError: a factor does not fit its leaf.

    Cost: two eigendecompositions a layer to build, four matrix products a layer to apply.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean(jnp.sum((x @ w - 1.0) ** 2, 1))
      >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0], [0.0, 0.1]])
      >>> _, grads, extras = optalr.value_grad_and_extras(loss_fn)(w, x)
      >>> apply = kronecker_preconditioner()(extras, 0.0)
      >>> apply(grads).shape
      (2, 1)

    Reference:
      Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
      2015; the damping acts on the product exactly, as in George et al. 2018.
    """
    check_interval("relative_damping", relative_damping, 0.0, open_high=True)

    def build(extras: dict[str, Any], damping: Any) -> Callable[[Any], Any]:
        signals = require_extra(extras, "signals", "kronecker_preconditioner")
        layers: dict[str, tuple[LayerMoments, EigenBasis, EigenBasis]] = {}
        biases: dict[str, str] = {}
        for path, node in jax.tree_util.tree_leaves_with_path(signals, is_leaf=is_moments):
            if is_moments(node):
                name = jax.tree_util.keystr(path)
                layers[name] = (node, eigenbasis(node.rows), eigenbasis(node.cols))
                if node.bias is not None:
                    biases[node.bias] = name
        other = _curvature_elsewhere([node for node, _, _ in layers.values()], relative_damping)

        def leaf(path: Any, r: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path)
            if name in layers:
                return _solve_kernel(name, r, *layers[name], damping, relative_damping, layout)
            if name in biases and r.ndim == 1:
                return _solve_bias(r, *layers[biases[name]], damping, relative_damping)
            return r / other(damping)

        return lambda tree: jax.tree_util.tree_map_with_path(leaf, tree)

    return build


def _curvature_elsewhere(nodes: list[LayerMoments], relative: float) -> Callable[[Any], jax.Array]:
    """Return λ ↦ the divisor of leaves without a layer; 1 where nothing was captured."""
    if not nodes:
        return lambda damping: jnp.ones(())
    captured = jnp.any(jnp.stack([jnp.max(node.count) > 0 for node in nodes]))
    typical = jnp.mean(jnp.stack([jnp.mean(_mean_curvature(node)) for node in nodes]))
    return lambda damping: jnp.where(captured, damping + (1 + relative) * typical, 1.0)


def _mean_curvature(node: LayerMoments) -> jax.Array:
    """Return the mean eigenvalue of ``B ⊗ A``; 1 where nothing was captured."""
    mean = mean_eigenvalue(node.rows) * mean_eigenvalue(node.cols)
    return jnp.where((node.count > 0) & (mean > 0), mean, 1.0)


def _solve_kernel(
    name: str,
    r: jax.Array,
    node: LayerMoments,
    left: EigenBasis,
    right: EigenBasis,
    damping: Any,
    relative: float,
    layout: Coverage | None,
) -> jax.Array:
    view: LeafView | None = default_view(r.shape) if layout is None else layout[name].view
    if view is None or view.matrix_shape(r.shape)[1:] != (node.rows.shape[-1], node.cols.shape[-1]):
        raise ValueError(
            f"the captured factors of {name}, {node.rows.shape} and {node.cols.shape}, do not fit "
            f"its shape {r.shape}. Pass layout=optalr.coverage(loss_fn, params, *args)."
        )
    # Without a captured batch the factors are zero: λ = 1 makes the inverse the identity.
    shift = jnp.where(node.count > 0, damping + relative * _mean_curvature(node), 1.0)
    solved = apply_eigenbasis_power(view.to_matrix(r), left, right, -1.0, shift)
    return view.from_matrix(solved, r.shape).astype(r.dtype)


def _solve_bias(
    r: jax.Array,
    node: LayerMoments,
    left: EigenBasis,
    right: EigenBasis,
    damping: Any,
    relative: float,
) -> jax.Array:
    gram, basis = (node.cols, right) if node.input_side == "rows" else (node.rows, left)
    mean = mean_eigenvalue(gram)
    floor = jnp.where(mean > 0, mean, 1.0)
    shift = jnp.where(node.count > 0, damping + relative * floor, 1.0)
    return apply_eigenbasis_power(r[:, None], basis, None, -1.0, shift)[:, 0].astype(r.dtype)
