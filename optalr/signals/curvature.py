"""Products with the Hessian and the Gauss-Newton matrix of a loss, never the matrices themselves.

Write the loss as ``ℓ(w) = L(φ(w))`` with outputs ``φ`` and an output loss ``L``. Then

    Hessian        H = Jᵀ H_L J + Σ_m F_m ∇²φ_m      J = ∂φ/∂w,  F = ∂L/∂φ,  H_L = ∂²L/∂φ²
    Gauss-Newton   G = Jᵀ H_L J

``G`` is positive semidefinite wherever ``L`` is convex in the outputs; ``H`` need not be. A product
with ``G`` is one pass of the linearized model, ``H_L`` applied to its outputs, and one pass of the
transpose: four matrix products a layer where the gradient takes three. Every product linearizes
anew from ``params``, so that it is a function of arrays only; under ``jit`` XLA merges the equal
linearizations of the gradient and of all products into one. Max poolings get a derivative that
takes no memory of its own for every product (``pooling``).

In: functions of parameters, and the point. Out: ``Partial``s ``v ↦ A v``, which may cross a ``jit``
boundary.

``H_L`` is found by differentiation for any output loss, or comes as the ``output_product`` of a
``composite_loss``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from optalr.signals.pooling import with_light_pooling


def hessian_product(loss_fn: Callable[[Any], jax.Array], params: Any) -> Partial:
    """Return ``v ↦ H v`` for the Hessian of ``loss_fn`` at ``params``.

    Computed forward over reverse: the directional derivative of the gradient, about two gradients
    a product beyond the gradient itself.

    Args:
      loss_fn: ``loss_fn(params) -> scalar``. Data go in by ``jax.tree_util.Partial``; a plain
        closure works as well, but retraces where the result crosses a ``jit`` boundary.
      params: a pytree of floating arrays, the point of linearization.

    Returns:
      A ``jax.tree_util.Partial``; its argument and its value have the structure, shapes and dtypes
      of ``params`` (the argument is cast to them).

    Examples:
      >>> import jax.numpy as jnp
      >>> product = hessian_product(lambda w: w["a"] ** 2 * w["b"], {"a": 1.0, "b": 3.0})
      >>> hv = product({"a": 1.0, "b": 0.0})
      >>> float(hv["a"]), float(hv["b"])
      (6.0, 2.0)

    Reference:
      Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6(1), 1994.
    """
    return Partial(_apply_hessian, _as_partial(loss_fn), jax.tree.map(jnp.asarray, params))


def gauss_newton_product(
    predict_fn: Callable[[Any], Any],
    output_loss: Callable[[Any], jax.Array],
    params: Any,
    *,
    has_aux: bool = False,
    output_product: Callable[[Any, Any], Any] | None = None,
) -> Partial:
    """Return ``v ↦ Jᵀ H_L J v`` for ``output_loss(predict_fn(params))`` at ``params``.

    Args:
      predict_fn: ``predict_fn(params) -> outputs``, any pytree of arrays of any rank (a batch of
        sequences of class scores, say).
      output_loss: ``output_loss(outputs) -> scalar``, twice differentiable in the outputs.
      params: a pytree of floating arrays, the point of linearization.
      has_aux: whether ``predict_fn`` returns ``(outputs, aux)``; aux (new batch statistics, say) is
        dropped.
      output_product: ``output_product(outputs, u) -> H_L u``, used instead of differentiating
        ``output_loss``, for example a ``Partial`` of ``softmax_product``.

    Returns:
      A ``jax.tree_util.Partial``; its argument and its value have the structure, shapes and dtypes
      of ``params`` (the argument is cast to them).

    Cost:
      One forward pass, one pass of the linearized model and one of its transpose. Under ``jit`` the
      forward pass is shared with the gradient at the same point.

    Examples:
      >>> import jax.numpy as jnp
      >>> X = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> squared = lambda z: 0.5 * jnp.sum(z**2)
      >>> product = gauss_newton_product(lambda w: X @ w, squared, jnp.zeros(2))
      >>> bool(jnp.allclose(product(jnp.array([1.0, 0.0])), (X.T @ X)[:, 0]))
      True

    Reference:
      Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
      Computation 14(7), 2002; "Exponentially decaying flows for optimization in deep learning",
      eq. 17.
    """
    predict = _as_partial(_drop_aux, predict_fn) if has_aux else _as_partial(predict_fn)
    if output_product is None:
        output_product = _as_partial(_differentiated_product, output_loss)
    model = (predict, _as_partial(output_product))
    return Partial(_apply_gauss_newton, model, jax.tree.map(jnp.asarray, params))


def output_hessian_product(output_loss: Callable[[Any], jax.Array], outputs: Any, u: Any) -> Any:
    """Return ``H_L u`` by differentiating the gradient of ``output_loss`` along ``u``.

    This is what ``gauss_newton_product`` does if it is given no closed form.

    Args:
      output_loss: ``output_loss(outputs) -> scalar``.
      outputs: a pytree of floating arrays.
      u: a direction with the structure and dtypes of ``outputs``.
    """
    return jax.jvp(jax.grad(output_loss), (outputs,), (u,))[1]


def _apply_hessian(loss_fn: Any, params: Any, v: Any) -> Any:
    # Forward over reverse: one pass each way. Reverse over reverse would keep every intermediate of
    # the first backward pass for the second.
    gradient = jax.grad(with_light_pooling(loss_fn))
    return jax.jvp(gradient, (params,), (in_dtypes_of(params, v),))[1]


def _apply_gauss_newton(model: tuple[Any, Any], params: Any, v: Any) -> Any:
    predict_fn, output_product = with_light_pooling(model[0]), model[1]
    # Forward for J v and reverse for Jᵀ, each with a linearization of its own: written in this way
    # they are equal to XLA, which merges them, and no residuals cross a jit boundary.
    outputs, pushed = jax.jvp(predict_fn, (params,), (in_dtypes_of(params, v),))
    _, pull = jax.vjp(predict_fn, params)
    return pull(output_product(outputs, pushed))[0]


def _drop_aux(predict_fn: Any, params: Any) -> Any:
    return predict_fn(params)[0]


def _differentiated_product(output_loss: Any, outputs: Any, u: Any) -> Any:
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                "the Gauss-Newton product needs floating outputs, but predict_fn's outputs"
                f"{jax.tree_util.keystr(path)} are {jnp.result_type(leaf)}. Return what is not "
                "differentiated as aux, with has_aux=True."
            )
    return output_hessian_product(output_loss, outputs, u)


def _as_partial(fn: Any, *bound: Any) -> Partial:
    """Return a Partial all of whose callables are static and all of whose arrays are leaves."""
    # A plain function among a Partial's arguments would be a leaf, and jit takes arrays only.
    if bound:
        return Partial(fn, *(_as_partial(item) for item in bound))
    return fn if isinstance(fn, Partial) else Partial(fn)


def in_dtypes_of(params: Any, v: Any) -> Any:
    """Return a direction in the dtypes of the parameters."""
    return jax.tree.map(lambda x, p: jnp.asarray(x).astype(jnp.result_type(p)), v, params)
