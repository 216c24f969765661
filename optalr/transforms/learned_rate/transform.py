"""A learning rate that is learned: gradient descent or Newton's method on the rate itself.

Along the direction ``u`` of a step the loss is a function of the rate, ``f(η) = L(w − η u)``. The
weights move with the rate at hand; then the rate moves downhill on ``f`` (Ravaut & Gorti, "Faster
gradient descent via an adaptive learning rate").
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import (
    check_choice,
    check_count,
    check_interval,
    is_concrete,
    require_extra,
)
from optalr.arrays import all_finite, wide_dtype
from optalr.signals.ray import (
    ExactDerivatives,
    FiniteDifferences,
    by_path,
    inner_product,
    loss_along,
)
from optalr.transforms.learned_rate.rule import (
    Outcome,
    RateSafeguards,
    Reading,
    Rule,
    keep,
    resolve_safeguards,
)
from optalr.transforms.loss_watch import LossWatch, bound_step, start_watch, watch_loss

# The window, in rate updates, of the average that is reported and suggested.
AVERAGED_UPDATES = 100

_PROBE_REMEDY = (
    "Pass tx.update(grads, opt_state, params, **extras, {probe}=jax.tree_util.Partial(...)), a "
    "function of the parameters that returns the loss to probe."
)


@dataclasses.dataclass(frozen=True)
class SuccessiveGradients:
    """Take ``f'(η_t) = −u_tᵀ g_{t+1}`` from the next step's gradient, eq. 8: no extra pass.

    Known since as hypergradient descent (Baydin et al. 2018). On stochastic gradients it compares
    two batches. Gives no curvature, hence ``order=1`` only, and keeps the last direction in the
    state: one copy of the parameters.
    """


Derivatives = ExactDerivatives | FiniteDifferences | SuccessiveGradients
DERIVATIVES: Mapping[str, Derivatives] = MappingProxyType(
    {
        "exact": ExactDerivatives(),
        "finite_differences": FiniteDifferences(),
        "successive_gradients": SuccessiveGradients(),
    }
)


class LearnedRateState(NamedTuple):
    """State of ``scale_by_learned_rate``; scalars, float32 unless said otherwise.

    Attributes:
      count: int32, updates so far.
      learning_rate: the rate applied by the last update (the initial one before the first).
      next_rate: the rate that the next update starts from.
      average_rate: geometric mean of ``next_rate`` over about the last 100 rate updates.
      velocity: the momentum of the rate.
      ray_slope: f'(η) at the last probe.
      ray_curvature: f''(η) at the last probe.
      nonconvex_probes: int32, probes whose parabola has no minimum at a positive rate.
      runaway_steps: int32, steps cut because they would have raised the loss out of proportion.
      clipped_rates: int32, rates brought back to the floor or the ceiling.
      bounded_steps: int32, steps cut to the safeguards' ``max_step``.
      failures: int32, probes or directions that were not finite.
      watch: what that safeguard remembers of the loss.
      direction: the last direction, a pytree like the parameters, with ``SuccessiveGradients``;
        else empty.
    """

    count: jax.Array
    learning_rate: jax.Array
    next_rate: jax.Array
    average_rate: jax.Array
    velocity: jax.Array
    ray_slope: jax.Array
    ray_curvature: jax.Array
    nonconvex_probes: jax.Array
    runaway_steps: jax.Array
    clipped_rates: jax.Array
    bounded_steps: jax.Array
    failures: jax.Array
    watch: LossWatch
    direction: Any


def scale_by_learned_rate(
    initial_rate: Any,
    *,
    order: int = 2,
    meta_rate: Any = 1e-3,
    derivatives: str | Mapping[str, Any] | Derivatives = "exact",
    rate_momentum: Any = 0.0,
    every: Any = 1,
    lag: bool = True,
    probe: str = "value_fn",
    safeguards: RateSafeguards | Mapping[str, Any] | str | None = "on",
) -> optax.GradientTransformationExtraArgs:
    """Multiply by minus a learning rate that is itself learned, from the loss along the step.

    Choose it as the last link of a chain, where the right rate is unknown or changes; in the first
    epochs above all. The incoming direction ``u`` (gradient, momentum, preconditioned gradient) is
    an ascent direction, and ``f(η) = L(w − η u)`` on the same batch, with the same dropout key:

        w ← w − η u,    then    η ← η − f'(η) / f''(η)    (order 2)
                                η ← η − α f'(η)           (order 1)

    On a quadratic, one update of order 2 gives the exact line-search rate from any η. Because
    it is applied one step late, the method is then that of Barzilai and Borwein, which is fast and
    not monotone: the loss spikes now and then. ``lag=False`` gives steepest descent instead.
    Order 2 is invariant under a change of the loss's scale; order 1 is not.

    Args:
      initial_rate: η₀ > 0.
      order: 1 or 2.
      meta_rate: α > 0 of order 1, in units of η per unit of f'; below η₀ as a rule. The paper's
        are 1e-9 (Boston Housing, η₀ = 1e-7) and 1e-6 (MNIST).
      derivatives: ``"exact"``, ``"finite_differences"`` (the paper's five loss values),
        ``"successive_gradients"`` (order 1 without a probe); or configured, as an
        ``ExactDerivatives``, ``FiniteDifferences`` or ``SuccessiveGradients``, or as a mapping
        (``{"name": "finite_differences", "step": 1e-2}``).
      rate_momentum: β in [0, 1) of the rate's own momentum, v ← βv + Δη, η ← η + v (eq. 20-21).
      every: update the rate at every so many steps (≥ 1); the others cost what plain SGD does.
      lag: whether a new rate is applied from the next step on, as published, or at once; then it
        has not been probed: where f is almost straight, bound it by the safeguards' ``ceiling``.
      probe: the name of the extra argument that holds f's loss, ``value_fn(params) -> scalar``: the
        training batch by default; pass a ``jax.tree_util.Partial`` over a validation batch
        (eq. 22-23) or over part of the batch under a name of your own.
      safeguards: what to do where Newton's rule fails: ``"on"``, a ``RateSafeguards`` or a mapping
        of its fields; ``"off"`` or None for the paper's bare rule, whose only safeguard is the
        floor of 1e-6.

    Returns:
      A transformation. ``update`` reads the extras ``value_fn`` (or ``probe``), ``point``,
      ``value`` and ``grad``; the last three are optional for unmasked use, the runaway safeguard
      needs ``grad``.

    Raises:
      ValueError: an argument is out of range, or ``"successive_gradients"`` with order 2.
      TypeError: ``update`` got neither ``value_fn`` (or ``probe``), or the loss has no forward
        derivative.

    Cost: with exact derivatives of order 2 five products a layer, 5/3 of a gradient (2/3 to 1 with
      order 1); five forward passes with finite differences. No memory beyond a forward pass.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optalr
      >>> loss = lambda w: 0.5 * (w[0] ** 2 + 4 * w[1] ** 2)
      >>> tx = optalr.scale_by_learned_rate(0.01)
      >>> w = jnp.array([1.0, 1.0])
      >>> grads, state = jax.grad(loss)(w), tx.init(w)
      >>> updates, state = tx.update(grads, state, w, value_fn=jax.tree_util.Partial(loss))
      >>> bool(jnp.allclose(optax.apply_updates(w, updates), w - 0.01 * grads))
      True
      >>> exact = (1 + 16) / (1 + 4 * 16)  # gᵀg / gᵀHg
      >>> bool(jnp.allclose(state.next_rate, exact))
      True

    Reference: Ravaut, Gorti, "Faster gradient descent via an adaptive learning rate", eq. 5-23.
      Departures: exact derivatives instead of differences (at ε = 1e-5 in float32 the paper's are
      rounding noise), safeguards, and f'' = gᵀHg (eq. 11 lacks the trailing g). The lag as an
      option, after Barzilai, Borwein, "Two-point step size gradient methods", 1988.
    """
    derivatives = _resolve(derivatives, order)
    check_interval("initial_rate", initial_rate, 0.0, open_low=True, remedy="Try 1e-2.")
    check_interval("meta_rate", meta_rate, 0.0, open_low=True)
    check_interval("rate_momentum", rate_momentum, 0.0, 1.0, open_high=True)
    check_count("every", every)
    safeguards = resolve_safeguards(safeguards)
    keeps_direction = isinstance(derivatives, SuccessiveGradients)
    # The gradient comes a step late, so the rate that it moves is applied at once (eq. 8).
    rule = Rule(order, meta_rate, rate_momentum, lag and not keeps_direction, safeguards)

    def init_fn(params: Any) -> LearnedRateState:
        def rate() -> jax.Array:  # a buffer for each field, so that states can be donated
            return jnp.array(initial_rate, jnp.float32)

        def zeros(dtype: Any) -> jax.Array:
            return jnp.zeros((), dtype)

        return LearnedRateState(
            count=zeros(jnp.int32),
            learning_rate=rate(),
            next_rate=rate(),
            average_rate=rate(),
            velocity=zeros(jnp.float32),
            ray_slope=zeros(jnp.float32),
            ray_curvature=zeros(jnp.float32),
            nonconvex_probes=zeros(jnp.int32),
            runaway_steps=zeros(jnp.int32),
            clipped_rates=zeros(jnp.int32),
            bounded_steps=zeros(jnp.int32),
            failures=zeros(jnp.int32),
            watch=start_watch(),
            direction=jax.tree.map(jnp.zeros_like, params) if keeps_direction else (),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extras: Any
    ) -> tuple[Any, LearnedRateState]:
        # Measure the loss along the ray, where it is due.
        rate, velocity = state.next_rate, state.velocity
        due = state.count % jnp.asarray(every, jnp.int32) == 0
        if isinstance(derivatives, SuccessiveGradients):
            reading = _compare_gradients(state.direction, extras.get("grad", updates))
        else:
            measure = _prober(derivatives, rule, updates, params, probe, extras)
            if is_concrete(every) and int(every) == 1:
                reading = measure(rate)
            else:
                nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(measure, rate))
                reading = jax.lax.cond(due, measure, lambda _: nothing, rate)

        # Refresh the rate.
        outcome = rule.decide(reading, rate, velocity, state.average_rate)
        outcome = outcome.unless(~due, keep(rate, velocity, move=True, failed=False))
        if safeguards.nonfinite is not None:
            refused = keep(rate, velocity, move=False, failed=True)
            outcome = outcome.unless(~all_finite(updates), refused)

        if safeguards.max_step is not None:
            watch = watch_loss(state.watch, extras.get("value"), safeguards.max_rise)
            applied, cut = bound_step(outcome.applied, updates, safeguards.max_step, watch)
            outcome = outcome._replace(applied=applied)
            state = state._replace(watch=watch, bounded_steps=state.bounded_steps + cut)

        # Apply it.
        new_state = _advance(state, outcome, reading, due, every)
        if keeps_direction:
            kept = jax.tree.map(lambda u, old: u.astype(old.dtype), updates, state.direction)
            new_state = new_state._replace(direction=kept)
        return jax.tree.map(lambda u: _scale(u, outcome.applied), updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _resolve(derivatives: str | Mapping[str, Any] | Derivatives, order: Any) -> Derivatives:
    """Return the configured derivatives, refusing what does not fit the order."""
    if is_concrete(order) and order not in (1, 2):
        raise ValueError(f"order must be 1 (gradient descent) or 2 (Newton), got {order!r}.")
    if isinstance(derivatives, str):
        derivatives = {"name": derivatives}
    if isinstance(derivatives, Mapping):
        fields = dict(derivatives)
        check_choice("derivatives", name := fields.pop("name", "exact"), tuple(DERIVATIVES))
        derivatives = dataclasses.replace(DERIVATIVES[name], **fields)
    if not isinstance(derivatives, Derivatives):
        raise TypeError(
            f"derivatives must be one of {', '.join(DERIVATIVES)} or a configured "
            f"ExactDerivatives, FiniteDifferences or SuccessiveGradients, got {derivatives!r}."
        )
    if isinstance(derivatives, SuccessiveGradients) and is_concrete(order) and order != 1:
        raise ValueError(
            "derivatives='successive_gradients' gives no curvature. Pass order=1 with it."
        )
    return derivatives


def _prober(
    derivatives: ExactDerivatives | FiniteDifferences,
    rule: Rule,
    updates: Any,
    params: Any,
    probe: str,
    extras: dict[str, Any],
) -> Callable[[jax.Array], Reading]:
    """Return the function of the rate that takes a reading along ``updates``."""
    remedy = "" if probe == "value_fn" else _PROBE_REMEDY.format(probe=probe)
    value_fn = require_extra(extras, probe, "scale_by_learned_rate", remedy)
    point = extras.get("point", params)
    if point is None:
        raise TypeError(
            "scale_by_learned_rate needs the parameters: call tx.update(grads, opt_state, params, "
            "**extras)."
        )
    kind = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in by_path(updates).values()))
    ray = loss_along(value_fn, point, updates)
    order = int(rule.order) if is_concrete(rule.order) else 2
    watches = rule.safeguards.runaway is not None and "grad" in extras
    known = probe == "value_fn" and "value" in extras

    def measure(rate: jax.Array) -> Reading:
        eta = rate.astype(kind)
        start, decrease = -jnp.inf, 0.0
        if watches:
            start = extras["value"] if known else ray(jnp.zeros_like(eta))
            decrease = inner_product(updates, extras["grad"])
        try:
            found = derivatives.measure(ray, eta, order)
        except (TypeError, NotImplementedError) as error:
            if "custom_vjp" not in str(error) and "custom_lin" not in str(error):
                raise
            raise TypeError(
                "the loss has no forward derivative, because of a jax.custom_vjp in it. Pass "
                "derivatives=optalr.FiniteDifferences(step=1e-2) to scale_by_learned_rate."
            ) from error
        return Reading(*(jnp.asarray(x).astype(kind) for x in (*found, start, decrease)))

    return measure


def _compare_gradients(direction: Any, gradient: Any) -> Reading:
    """Return the reading of the last step that the new gradient gives: f' = −uᵀg."""
    slope = -inner_product(direction, gradient)
    zero = jnp.zeros_like(slope)
    return Reading(zero, slope, zero, zero, zero)


def _advance(
    state: LearnedRateState, outcome: Outcome, reading: Reading, due: jax.Array, every: Any
) -> LearnedRateState:
    """Return the state after one update, but for the direction."""
    refreshed = due & ~outcome.failed & (outcome.next_rate > 0)
    updates_so_far = state.count // jnp.asarray(every, jnp.int32) + 1 - state.failures
    share = 1 / jnp.clip(updates_so_far, 1, AVERAGED_UPDATES).astype(jnp.float32)
    average = state.average_rate * (outcome.next_rate / state.average_rate) ** share
    return state._replace(
        count=optax.safe_increment(state.count),
        learning_rate=outcome.applied,
        next_rate=outcome.next_rate,
        average_rate=jnp.where(refreshed, average, state.average_rate),
        velocity=outcome.velocity,
        ray_slope=jnp.where(due, reading.slope.astype(jnp.float32), state.ray_slope),
        ray_curvature=jnp.where(due, reading.curvature.astype(jnp.float32), state.ray_curvature),
        nonconvex_probes=state.nonconvex_probes + outcome.nonconvex,
        runaway_steps=state.runaway_steps + outcome.runaway,
        clipped_rates=state.clipped_rates + outcome.clipped,
        failures=state.failures + outcome.failed,
    )


def _scale(update: jax.Array, rate: jax.Array) -> jax.Array:
    """Return ``−rate · update`` in its dtype; zero where the rate is, finite update or not."""
    dtype = wide_dtype(update)
    scaled = -rate.astype(jnp.finfo(dtype).dtype) * update.astype(dtype)
    return jnp.where(rate == 0, 0, scaled).astype(update.dtype)
