"""Captured Kronecker factors as the preconditioner of an iterative solve."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval, require_extra
from optalr.linalg.kronecker import apply_eigenbasis_power, mean_eigenvalue
from optalr.linalg.roots.bases import EigenBasis, eigenbasis
from optalr.linalg.structured import Structured
from optalr.signals.coverage import Coverage
from optalr.signals.moments import LayerMoments, LeafView, default_view, is_moments


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
      ValueError: a factor does not fit its leaf, or is not whole.

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
        layers: dict[str, _Layer] = {}
        biases: dict[str, _Layer] = {}
        for path, node in jax.tree_util.tree_leaves_with_path(signals, is_leaf=is_moments):
            if not is_moments(node):
                continue
            name = jax.tree_util.keystr(path)
            _check_whole(name, node)
            layers[name] = _Layer(node, eigenbasis(node.rows), eigenbasis(node.cols))
            if node.bias is not None:
                biases[node.bias] = layers[name]
        elsewhere = _curvature_elsewhere(list(layers.values()), damping, relative_damping)

        def solve(path: Any, r: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path)
            if name in layers:
                layer = layers[name]
                found = default_view(r.shape) if layout is None else layout[name].view
                view = _checked(found, name, r.shape, layer=layer)
                shift = layer.shift(layer.mean_curvature(), damping, relative_damping)
                bases = layer.left, layer.right
                solved = apply_eigenbasis_power(view.to_matrix(r), *bases, -1.0, shift)
                return view.from_matrix(solved, r.shape).astype(r.dtype)
            if name in biases and r.ndim == 1:
                gram, basis = biases[name].output_side
                shift = biases[name].shift(mean_eigenvalue(gram), damping, relative_damping)
                solved = apply_eigenbasis_power(r[:, None], basis, None, -1.0, shift)
                return solved[:, 0].astype(r.dtype)
            return r / elsewhere

        return lambda tree: jax.tree_util.tree_map_with_path(solve, tree)

    return build


class _Layer(NamedTuple):
    """What was captured of one layer in this batch, and the eigenbases of its factors."""

    moments: LayerMoments
    left: EigenBasis
    right: EigenBasis

    @property
    def output_side(self) -> tuple[jax.Array, EigenBasis]:
        """The factor that meets the layer's output, which is that of its bias."""
        if self.moments.input_side == "rows":
            return self.moments.cols, self.right
        return self.moments.rows, self.left

    def mean_curvature(self) -> jax.Array:
        """Return the mean eigenvalue of ``B ⊗ A``; 1 where nothing was captured."""
        mean = mean_eigenvalue(self.moments.rows) * mean_eigenvalue(self.moments.cols)
        return jnp.where((self.moments.count > 0) & (mean > 0), mean, 1.0)

    def shift(self, mean: jax.Array, damping: Any, relative: float) -> jax.Array:
        """Return what is added to eigenvalues of this mean."""
        mean = jnp.where(mean > 0, mean, 1.0)
        # Without a captured batch the factors are zero: λ = 1 makes the inverse the identity.
        return jnp.where(self.moments.count > 0, damping + relative * mean, 1.0)


def _curvature_elsewhere(layers: Sequence[_Layer], damping: Any, relative: float) -> jax.Array:
    """Return the divisor of leaves without a layer; 1 where nothing was captured."""
    if not layers:
        return jnp.ones(())
    captured = jnp.any(jnp.stack([jnp.max(layer.moments.count) > 0 for layer in layers]))
    typical = jnp.mean(jnp.stack([jnp.mean(layer.mean_curvature()) for layer in layers]))
    return jnp.where(captured, damping + (1 + relative) * typical, 1.0)


def _check_whole(name: str, moments: LayerMoments) -> None:
    for gram in (moments.rows, moments.cols):
        if isinstance(gram, Structured):
            raise ValueError(
                f"signals hold a {gram.label} of {name}, but a preconditioner needs whole Gram "
                "matrices. Call optalr.value_grad_and_extras without storage=."
            )


def _checked(
    view: LeafView | None, name: str, shape: tuple[int, ...], *, layer: _Layer
) -> LeafView:
    """Return the view of a kernel, or raise if the captured factors are of another shape."""
    rows, cols = layer.moments.rows.shape, layer.moments.cols.shape
    if view is None or view.matrix_shape(shape)[1:] != (rows[-1], cols[-1]):
        raise ValueError(
            f"the captured factors of {name}, {rows} and {cols}, do not fit its shape {shape}. "
            "Pass layout=optalr.coverage(loss_fn, params, *args)."
        )
    return view
