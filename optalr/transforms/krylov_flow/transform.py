"""The exponentially decaying flow: the gradient solved against curvature by a few Krylov steps.

The flow ``G dw/dt = −∇`` makes the loss's derivative in the outputs decay as ``e^{−t}``. With the
Gauss-Newton matrix (type G) or the Hessian (type H) for ``A``, a step solves ``(A + λI) v = ∇`` by
``k`` steps of MINRES and moves along ``−v``: ``k = 1`` is a gradient step whose length is set by
the curvature along the gradient, a large ``k`` is a Gauss-Newton or Newton step.

"Exponentially decaying flows for optimization in deep learning", eq. 20-24 and appendix A.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import (
    check_choice,
    check_count,
    check_interval,
    from_fields,
    require_extra,
)
from optalr.arrays import wide_dtype
from optalr.linalg.minres.linear_solve import MinresResult, minres, minres_step
from optalr.linalg.minres.vectors import divide, dot, largest, where
from optalr.states import count_up
from optalr.transforms.krylov_flow.damping import (
    LevenbergMarquardt,
    damping_rule,
    judge,
    refuse_schedule,
)
from optalr.transforms.subtrees import restrict

_SUPPLY = (
    "Give the loss as optalr.composite_loss(predict_fn, output_loss), replace jax.value_and_grad "
    "by evaluate = optalr.value_grad_and_extras(loss), call value, grads, extras = "
    "evaluate(params, ...) and pass tx.update(grads, opt_state, params, **extras); or choose "
    "curvature='hessian', which works with any loss."
)


class KrylovFlowState(NamedTuple):
    """State of ``scale_by_krylov_flow``; every field changes at every update.

    Attributes:
      count: int32 scalar, updates so far.
      wants_signals: bool scalar, constant: whether a preconditioner reads signals.
      damping: float32 scalar, λ of the last solve; before the first, that of a gradient of norm 1.
      next_damping: float32 scalar, λ of the next solve under a Levenberg-Marquardt rule.
      krylov_residual: float32 scalar, ``‖∇ − (A + λI) v‖/‖∇‖`` of the last solve; with a
        preconditioner M in its norm, ``√(rᵀ M r)``. v is the last iterate, also where an earlier
        one was taken for negative curvature.
      reduction_ratio: float32 scalar, actual over predicted decrease; 1 without the rule.
      negative_curvature: int32 scalar, updates that met a direction of nonpositive curvature.
      rejections: int32 scalar, steps that a ``LevenbergMarquardt`` rule turned into zero updates;
        ``reduction_ratio`` is then that of the step refused.
      failures: int32 scalar, updates in which the gradient, a product or λ was not finite; λ then
        keeps its last value.
    """

    count: jax.Array
    wants_signals: jax.Array
    damping: jax.Array
    next_damping: jax.Array
    krylov_residual: jax.Array
    reduction_ratio: jax.Array
    negative_curvature: jax.Array
    rejections: jax.Array
    failures: jax.Array


def scale_by_krylov_flow(
    *,
    curvature: str = "gauss_newton",
    num_steps: int = 1,
    damping: tuple[Any, Any] | LevenbergMarquardt | Mapping[str, Any] = (1.0, 1.0),
    tol: Any = 0.0,
    preconditioner: Callable[..., Callable[[Any], Any]] | None = None,
    negative_curvature: str = "descend",
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by a few MINRES steps toward ``(A + λI)⁻¹`` of it.

    Choose it for least squares and cross-entropy losses where a gradient step makes slow progress
    and one to a few curvature products a step are affordable: in full-batch fitting with many
    steps and little damping, in mini-batch training with ``num_steps`` 1 or 2 and the default
    damping. The result is an ascent direction: a learning rate (1 for the undamped flow), a learned
    rate, momentum or clipping may follow.

    Args:
      curvature: ``"gauss_newton"`` (type G; the loss must be an ``optalr.composite_loss``) or
        ``"hessian"`` (type H).
      num_steps: k, MINRES steps, an integer of at least 1; 1 is solved in closed form.
      damping: ``(a, b)`` for ``λ = a ‖∇‖^b``, both at least 0: ``(1, 1)`` for mini-batches,
        ``(0, b)`` for none, ``(λ, 0)`` for a constant; ``a`` may be a schedule. Or a
        ``LevenbergMarquardt`` rule or a mapping of its fields, which costs one more evaluation of
        the loss.
      tol: leave the solution alone once its residual is below ``tol ‖∇‖``; in [0, 1).
      preconditioner: ``preconditioner(extras, damping)`` returns the linear map ``r ↦ M r`` that
        approximates ``(A + λI)⁻¹``, for example ``optalr.kronecker_preconditioner()``.
      negative_curvature: ``"descend"``: where MINRES ends in a direction along which the loss
        rises, take its last iterate before nonpositive curvature showed up (in the first step,
        the gradient with the absolute value of its factor). ``"keep"``: the flow as the paper has
        it, which can climb.

    Returns:
      A transformation that solves against whatever arrives in the chain.

    Raises:
      ValueError: an argument is out of range.
      TypeError: ``num_steps`` is no integer, or an argument other than ``a`` a schedule; at
        ``update``, an extra is missing.

    Cost:
      A product is one pass of the linearized model and one of its transpose (type G; four matrix
      products a layer where the gradient takes three) or about two gradients (type H). Memory: some
      ten times the parameters, and one linearization, whatever ``num_steps`` is; but on a CPU XLA
      keeps the cotangents of max poolings over windows of more than 16 entries, and of those inside
      ``jax.checkpoint``, loops and branches, the size of their inputs, once a product (a pooling by
      ``reshape`` and ``max`` avoids it).

      On a CPU XLA runs gradients of convolutions 10 to 20 times slower inside ``cond``, ``scan``
      or ``while``. The flow has none around its products, but ``optalr.two_stage`` and
      ``optax.apply_if_finite`` put a whole step inside one: with three convolutions of 32 channels
      and 16 images of 16x16, k = 1, 152 ms a step instead of 12.6 (SGD: 6.6). Switch in Python
      instead (train with the flow, go on with another optimizer on the same parameters), or use an
      accelerator.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> X, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([5.0, 6.0])
      >>> loss = optalr.composite_loss(lambda w: X @ w, lambda z: 0.5 * jnp.sum((z - y) ** 2))
      >>> tx = optax.chain(
      ...     scale_by_krylov_flow(num_steps=2, damping=(0.0, 1.0)), optax.scale(-1.0)
      ... )
      >>> w = jnp.zeros(2)
      >>> value, grads, extras = optalr.value_grad_and_extras(loss)(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> bool(loss(optax.apply_updates(w, updates)) < 1e-6)
      True

    Reference:
      "Exponentially decaying flows for optimization in deep learning", eq. 20-24, algorithms 1 and
      2. Algorithm 1 as printed adds ``λ∇`` to each product, which must be λ times the Lanczos
      vector. The paper leaves negative curvature (type H) unguarded: ``"keep"``.
    """
    check_choice("curvature", curvature, ("gauss_newton", "hessian"))
    check_choice("negative_curvature", negative_curvature, ("descend", "keep"))
    num_steps = _checked_steps(num_steps)
    refuse_schedule("tol", tol)
    check_interval("tol", tol, 0.0, 1.0, open_high=True)
    damping = from_fields("damping", damping, LevenbergMarquardt)
    rule = damping_rule(damping)

    def init_fn(params: Any) -> KrylovFlowState:
        del params
        count = jnp.zeros((), jnp.int32)
        first = rule(count, jnp.float32(1.0), jnp.float32(getattr(damping, "initial", 0.0)))
        return KrylovFlowState(
            count=count,
            wants_signals=jnp.asarray(preconditioner is not None),
            damping=first,
            next_damping=first,
            krylov_residual=jnp.zeros((), jnp.float32),
            reduction_ratio=jnp.ones((), jnp.float32),
            negative_curvature=jnp.zeros((), jnp.int32),
            rejections=jnp.zeros((), jnp.int32),
            failures=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params
        remedy = _SUPPLY if curvature == "gauss_newton" else ""
        product = require_extra(extras, curvature, "scale_by_krylov_flow", remedy)
        if isinstance(damping, LevenbergMarquardt):
            for name in ("value", "value_fn", "point"):
                require_extra(extras, name, "scale_by_krylov_flow with LevenbergMarquardt")
        # Parameters may be Python numbers, which have no dtype.
        updates, point = jax.tree.map(jnp.asarray, (updates, extras.get("point")))
        extras["point"] = point
        if not jax.tree.leaves(updates):
            return updates, _idle(state, rule)

        gradient = jax.tree.map(lambda u: u.astype(wide_dtype(u)), updates)
        wanted = rule(state.count, _norm(gradient), state.next_damping)
        shift = jnp.where(jnp.isfinite(wanted), wanted, state.damping)
        matvec = restrict(product, updates, point)
        if num_steps == 1 and preconditioner is None:
            solved = minres_step(matvec, gradient, damping=shift)
        else:
            mapping = None if preconditioner is None else preconditioner(extras, shift)
            solved = minres(
                matvec,
                gradient,
                num_steps=num_steps,
                damping=shift,
                tol=tol,
                preconditioner=mapping,
            )

        direction, descends = solved.solution, jnp.asarray(True)
        if negative_curvature == "descend":
            descends = dot(gradient, direction) > 0
            direction = where(descends, direction, solved.trusted)
        state = _measured(state, solved, shift, jnp.isfinite(wanted))
        if isinstance(damping, LevenbergMarquardt):
            verdict = judge(
                damping,
                solved,
                gradient,
                direction,
                descends=descends,
                damping=shift,
                last_ratio=state.reduction_ratio,
                extras=extras,
            )
            direction = verdict.direction
            state = state._replace(
                next_damping=verdict.damping,
                reduction_ratio=verdict.reduction_ratio,
                rejections=state.rejections + verdict.rejected.astype(jnp.int32),
            )
        return jax.tree.map(lambda v, u: v.astype(u.dtype), direction, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked_steps(num_steps: Any) -> int:
    """Return ``num_steps`` as a Python int."""
    try:
        whole = None if isinstance(num_steps, bool) else operator.index(num_steps)
    except TypeError:  # a tracer's error is one, too
        whole = None
    if whole is None:
        raise TypeError(
            f"num_steps must be an integer, got {num_steps!r}: the steps are unrolled. Under "
            "optax.inject_hyperparams pass static_args=('num_steps',)."
        )
    check_count("num_steps", whole)
    return whole


def _idle(state: KrylovFlowState, rule: Callable[[Any, Any, Any], jax.Array]) -> KrylovFlowState:
    """Return the state after an update without leaves: that after a zero gradient."""
    return state._replace(
        count=count_up(state.count),
        damping=rule(state.count, jnp.zeros((), jnp.float32), state.next_damping),
        krylov_residual=jnp.zeros((), jnp.float32),
    )


def _measured(
    state: KrylovFlowState, solved: MinresResult, shift: Any, has_damping: Any
) -> KrylovFlowState:
    start, end = solved.residual_norms[0], solved.residual_norms[-1]
    relative = (end / jnp.where(start > 0, start, 1.0)).astype(jnp.float32)
    return state._replace(
        count=count_up(state.count),
        damping=shift,
        krylov_residual=jnp.where(jnp.isfinite(relative), relative, state.krylov_residual),
        negative_curvature=state.negative_curvature
        + solved.nonpositive_curvature.astype(jnp.int32),
        failures=state.failures + (solved.failed | ~has_damping).astype(jnp.int32),
    )


def _norm(gradient: Any) -> jax.Array:
    """Return the 2-norm, in range wherever the result is."""
    top = largest(gradient)
    unit = divide(gradient, top)
    return (top * jnp.sqrt(dot(unit, unit))).astype(jnp.float32)
