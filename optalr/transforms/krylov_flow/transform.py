"""The exponentially decaying flow: the gradient solved against curvature by a few Krylov steps.

The flow ``G dw/dt = −∇`` makes the loss's derivative in the outputs decay as ``e^{−t}``. With the
Gauss-Newton matrix (type G) or the Hessian (type H) for ``A``, a step solves ``(A + λI) v = ∇`` by
``k`` steps of MINRES and moves along ``−v``. With ``k = 1`` that is a gradient step, and the
curvature along the gradient sets its length. With a large ``k`` it is a Gauss-Newton or Newton
step.

"Exponentially decaying flows for optimization in deep learning", eq. 20-24 and appendix A.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import (
    SUPPLY,
    check_choice,
    check_function,
    check_interval,
    require_extra,
)
from optalr.arrays import wide_dtype
from optalr.linalg.minres.linear_solve import MinresResult
from optalr.linalg.minres.vectors import divide, dot, largest, multiply
from optalr.states import count_up
from optalr.transforms.krylov_flow.damping import (
    Damping,
    LevenbergMarquardt,
    Outlook,
    Trial,
    Verdict,
    refuse_schedule,
    resolve_damping,
)
from optalr.transforms.krylov_flow.minres_steps import ENDINGS, KrylovSolver, checked_steps
from optalr.transforms.shared.gradient_watch import GradientWatch, admit, start_gradient_watch
from optalr.transforms.shared.loss_watch import LossWatch, start_watch
from optalr.transforms.shared.making import transformation
from optalr.transforms.shared.rescaling import tree_scale
from optalr.transforms.shared.subtrees import restrict

_NAME = "scale_by_krylov_flow"
_COMPOSITE = (
    f"{SUPPLY.format(loss='optalr.composite_loss(predict_fn, output_loss)')} "
    "Or choose curvature='hessian', for any loss."
)
# What to do where the extra of a curvature is missing; empty stands for the usual remedy.
_REMEDIES: Mapping[str, str] = MappingProxyType({"gauss_newton": _COMPOSITE, "hessian": ""})


class KrylovFlowState(NamedTuple):
    """State of ``scale_by_krylov_flow``; every field but ``wants_signals`` changes each update."""

    count: jax.Array  # () int32, updates so far
    wants_signals: jax.Array  # () bool, constant: whether there is a preconditioner to read them
    damping: jax.Array  # () float32, λ of the last solve; before, that of a gradient of norm 1
    next_damping: jax.Array  # () float32, λ of the next solve under a Levenberg-Marquardt rule
    # () float32, ‖∇ − (A + λI) v‖/‖∇‖ of the last solve; with a preconditioner M in its norm,
    # √(rᵀ M r). v is the last iterate, even where negative curvature made an earlier one the
    # update.
    krylov_residual: jax.Array
    # () float32, actual over predicted decrease, of refused steps too; 1 without the rule
    reduction_ratio: jax.Array
    negative_curvature: jax.Array  # () int32, updates that met nonpositive curvature
    rejections: jax.Array  # () int32, steps that the rule turned into zero updates
    bounded_steps: jax.Array  # () int32, updates whose λ was held at its initial value
    watch: LossWatch  # what the rule remembers of the loss
    # () int32, updates in which the gradient, a product or λ was not finite (in place of such a λ
    # the last one is used), or the gradient was out of proportion
    failures: jax.Array
    gradients: GradientWatch  # what is remembered of the gradients' lengths


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

    Choose it for least squares and cross-entropy losses where gradient steps make slow progress
    and a few curvature products per step are affordable. Take many steps and little damping in
    full-batch fitting, and ``num_steps`` 1 or 2 and the default damping in mini-batch training.
    With A the curvature and ∇ the gradient, the update is the k-th iterate ``v`` of MINRES for

        (A + λI) v = ∇,        λ = a ‖∇‖^b.

    It is an ascent direction: a learning rate (1 for the undamped flow), a learned rate, momentum
    or clipping may follow. A gradient that was multiplied by c since the loss gave it (clipping,
    loss scaling) is solved against c A, if the extra ``grad`` is there.

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
      negative_curvature: ``"descend"`` acts where MINRES ends in a direction along which the loss
        rises: it takes the last iterate before nonpositive curvature showed up (in the first step,
        the gradient with the absolute value of its factor). ``"keep"`` is the flow of the
        paper, which can climb.

    Returns:
      A transformation that solves against whatever arrives in the chain.

    Raises:
      ValueError: an argument is out of range.
      TypeError: ``num_steps`` is no integer, ``damping`` is of another kind, or an argument other
        than ``a`` is a schedule; at ``update``, an extra is missing.

    Cost:
      A product of type G is one pass of the linearized model and one of its transpose: four matrix
      products per layer, where the gradient takes three. A product of type H costs about two
      gradients. Memory is some ten times the parameters, and one linearization, whatever
      ``num_steps`` is. On a CPU, XLA also keeps the cotangents of some max poolings, once per
      product, each as large as the pooling's input. These are the poolings over windows of more
      than 16 entries, and those inside ``jax.checkpoint``, loops and branches. A pooling by
      ``reshape`` and ``max`` avoids this.

      On a CPU, XLA runs gradients of convolutions 10 to 20 times slower inside ``cond``, ``scan``
      or ``while``. The flow has none around its products, but ``optalr.two_stage`` and
      ``optax.apply_if_finite`` put a whole step inside one. With three convolutions of 32 channels,
      16 images of 16x16 and k = 1, a step takes 14 times as long there
      (``benchmarks/flows.py --control-flow``). Switch in Python instead (train with the flow, then
      go on with another optimizer on the same parameters), or use an accelerator.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> X, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([5.0, 6.0])
      >>> loss = optalr.composite_loss(lambda w: X @ w, lambda z: 0.5 * jnp.sum((z - y) ** 2))
      >>> flow = optalr.scale_by_krylov_flow(num_steps=2, damping=(0.0, 1.0))
      >>> tx = optax.chain(flow, optax.scale(-1.0))
      >>> w = jnp.zeros(2)
      >>> value, grads, extras = optalr.value_grad_and_extras(loss)(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> bool(loss(optax.apply_updates(w, updates)) < 1e-6)
      True

    Reference:
      "Exponentially decaying flows for optimization in deep learning", eq. 20-24, algorithms 1 and
      2. Algorithm 1 as printed adds ``λ∇`` to each product; right is λ times the Lanczos vector.
      The paper does not guard against negative curvature (type H): ``"keep"``.
    """
    check_choice("curvature", curvature, tuple(_REMEDIES))
    check_choice("negative_curvature", negative_curvature, tuple(ENDINGS))
    num_steps = checked_steps(num_steps)
    check_function("preconditioner", preconditioner)
    refuse_schedule("tol", tol)
    check_interval("tol", tol, 0.0, 1.0, open_high=True)
    rule = resolve_damping(damping)
    solver = KrylovSolver(num_steps, tol, preconditioner, end=ENDINGS[negative_curvature])

    def init_fn(params: Any) -> KrylovFlowState:
        del params
        return _first_state(rule, wants_signals=preconditioner is not None)

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params
        product = _required(extras, curvature, rule)
        # Parameters may be Python numbers, which have no dtype.
        updates, point = jax.tree.map(jnp.asarray, (updates, extras.get("point")))
        extras["point"] = point
        if not jax.tree.leaves(updates):
            return updates, _idle(state, rule)
        gradient, state = _admitted(updates, state)

        # Measure the gradient, which sets the damping.
        wanted = rule.value(state.count, _norm_in_range(gradient), state.next_damping)
        shift = jnp.where(jnp.isfinite(wanted), wanted, state.damping)

        # Refresh the direction, and judge it.
        scale = tree_scale(gradient, extras.get("grad"))
        matvec = _scaled(restrict(product, updates, point), scale)
        solved = solver.solve(matvec, gradient, shift=shift, extras=extras)
        trial = Trial(solved, gradient, *solver.end(solved, gradient), shift, scale)
        last = Outlook(state.next_damping, state.reduction_ratio, state.watch)
        verdict = rule.judge(trial, last, extras)

        # Apply it.
        state = _after(state, solved, verdict, damping=shift, failed=~jnp.isfinite(wanted))
        return jax.tree.map(lambda v, u: v.astype(u.dtype), verdict.direction, updates), state

    return transformation("scale_by_krylov_flow", init_fn, update_fn, holds=KrylovFlowState)


def _admitted(updates: Any, state: KrylovFlowState) -> tuple[Any, KrylovFlowState]:
    """Return the gradient in float32 or wider, shortened where it is too long.

    One that is not finite stays so: the solve refuses it, and counts it.
    """
    given = admit(updates, state.gradients, squares=False)
    failures = count_up(state.failures, given.failed & ~given.bad)
    gradient = jax.tree.map(
        lambda u, g: jnp.where(given.bad, u, g).astype(wide_dtype(u)), updates, given.updates
    )
    return gradient, state._replace(gradients=given.watch, failures=failures)


def _scaled(product: Callable[[Any], Any], scale: jax.Array) -> Callable[[Any], Any]:
    """Return a product times a number.

    Curvature is that of the loss. A gradient that was multiplied by c since wants c A.
    """
    return lambda v: multiply(product(v), scale)


def _required(extras: dict[str, Any], curvature: str, rule: Damping) -> Callable[[Any], Any]:
    """Return the product with the curvature matrix; raise where an extra is missing."""
    product = require_extra(extras, curvature, _NAME, _REMEDIES[curvature])
    for name in rule.needs:
        require_extra(extras, name, f"{_NAME} with LevenbergMarquardt")
    return product


def _first_state(rule: Damping, *, wants_signals: bool) -> KrylovFlowState:
    """Return the state before the first update."""
    count = jnp.zeros((), jnp.int32)
    first = rule.value(count, jnp.float32(1.0), jnp.float32(rule.initial))
    return KrylovFlowState(
        count=count,
        wants_signals=jnp.asarray(wants_signals),
        damping=first,
        next_damping=jnp.array(first),  # a buffer of its own, so that states can be donated
        krylov_residual=jnp.zeros((), jnp.float32),
        reduction_ratio=jnp.ones((), jnp.float32),
        negative_curvature=jnp.zeros((), jnp.int32),
        rejections=jnp.zeros((), jnp.int32),
        bounded_steps=jnp.zeros((), jnp.int32),
        watch=start_watch(),
        failures=jnp.zeros((), jnp.int32),
        gradients=start_gradient_watch(),
    )


def _idle(state: KrylovFlowState, rule: Damping) -> KrylovFlowState:
    """Return the state after an update without leaves, which counts as a zero gradient."""
    return state._replace(
        count=count_up(state.count),
        damping=rule.value(state.count, jnp.zeros((), jnp.float32), state.next_damping),
        krylov_residual=jnp.zeros((), jnp.float32),
    )


def _after(
    state: KrylovFlowState,
    solved: MinresResult,
    verdict: Verdict,
    *,
    damping: jax.Array,
    failed: jax.Array,
) -> KrylovFlowState:
    """Return the state after a solve with ``damping``; ``failed`` says that λ was not finite."""
    start, end = solved.residual_norms[0], solved.residual_norms[-1]
    relative = (end / jnp.where(start > 0, start, 1.0)).astype(jnp.float32)
    met_negative = solved.nonpositive_curvature.astype(jnp.int32)
    return state._replace(
        count=count_up(state.count),
        damping=damping,
        next_damping=verdict.outlook.next_damping,
        krylov_residual=jnp.where(jnp.isfinite(relative), relative, state.krylov_residual),
        reduction_ratio=verdict.outlook.reduction_ratio,
        negative_curvature=count_up(state.negative_curvature, met_negative),
        rejections=count_up(state.rejections, verdict.rejected),
        bounded_steps=count_up(state.bounded_steps, verdict.bounded),
        watch=verdict.outlook.watch,
        failures=count_up(state.failures, solved.failed | failed),
    )


def _norm_in_range(gradient: Any) -> jax.Array:
    """Return the 2-norm, float32, by squares that stay in range."""
    top = largest(gradient)
    unit = divide(gradient, top)
    return (top * jnp.sqrt(dot(unit, unit))).astype(jnp.float32)
