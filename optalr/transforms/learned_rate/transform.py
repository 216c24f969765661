"""A learning rate that is learned: gradient descent or Newton's method on the rate itself.

Along the direction ``u`` of a step the loss is a function of the rate, ``f(η) = L(w − η u)``. The
weights move with the rate at hand; then the rate moves downhill on ``f`` (Ravaut & Gorti, "Faster
gradient descent via an adaptive learning rate").
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count, check_flag, check_interval, check_kind
from optalr.clocks import PROBE, Periodic, asking, period_of, permitted
from optalr.states import count_up
from optalr.transforms.learned_rate.probing import (
    Derivatives,
    SuccessiveGradients,
    UpdateInputs,
    reader_of,
    resolve_derivatives,
)
from optalr.transforms.learned_rate.rate_rule import (
    Outcome,
    RateMemory,
    RateRule,
    Reading,
    keep_rate,
    refuse_step,
)
from optalr.transforms.learned_rate.safeguards import RateSafeguards, resolve_safeguards
from optalr.transforms.shared.gradient_watch import (
    Admitted,
    GradientWatch,
    admit,
    start_gradient_watch,
)
from optalr.transforms.shared.lengths import follow_unless_zero
from optalr.transforms.shared.loss_watch import LossWatch, bound_step, start_watch, watch_loss
from optalr.transforms.shared.making import transformation

# The window, in rate updates, of the average that is reported and suggested. Single rates are
# noisy: each is the best one for one batch.
AVERAGED_UPDATES = 100


class LearnedRateState(NamedTuple):
    """State of ``scale_by_learned_rate``."""

    # every update
    count: jax.Array  # () int32, updates so far
    learning_rate: jax.Array  # () float32, the rate applied last; before, the initial one
    # every update of the rate
    next_rate: jax.Array  # () float32, the rate that the next update starts from
    average_rate: jax.Array  # () float32, geometric mean of next_rate over about the last 100
    velocity: jax.Array  # () float32, the momentum of the rate
    ray_slope: jax.Array  # () float32, f'(η) at the last probe
    ray_curvature: jax.Array  # () float32, f''(η) at the last probe
    # where a safeguard acts
    nonconvex_probes: jax.Array  # () int32, probes without a minimum at a positive rate
    runaway_steps: jax.Array  # () int32, steps cut: the loss would have risen out of proportion
    clipped_rates: jax.Array  # () int32, rates brought back to the floor or the ceiling
    bounded_steps: jax.Array  # () int32, steps cut to the safeguards' max_step
    # () int32, probes or directions that were not finite, and directions out of proportion
    failures: jax.Array
    watch: LossWatch  # what max_step remembers of the loss
    gradients: GradientWatch  # what is remembered of the directions' lengths
    # every update, with SuccessiveGradients
    direction: Any  # the last direction, like the parameters; else empty
    # for whoever runs a program made for one answer of the clock (optalr/clocks.py)
    told: jax.Array  # () int8, -1
    period: jax.Array  # () int32, updates between updates of the rate

    @property
    def clock(self) -> Periodic:
        """When to probe."""
        return Periodic(self.count, self.period)


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

    Choose it as the last link of a chain, where the right rate is unknown or changes, and above all
    in the first epochs. The direction ``u`` that arrives (gradient, momentum, preconditioned
    gradient) is one of ascent. With ``f(η) = L(w − η u)`` on the same batch and the same dropout
    key,

        w ← w − η u,    then    η ← η − f'(η) / f''(η)    (order 2)
                                η ← η − α f'(η)           (order 1)

    On a quadratic, one update of order 2 gives the exact line-search rate from any η. It is applied
    one step late, which makes the method that of Barzilai and Borwein. That is fast but not
    monotone: the loss spikes now and then. ``lag=False`` gives steepest descent instead. Order 2 is
    invariant under a change of the loss's scale; order 1 is not.

    Args:
      initial_rate: η₀ > 0.
      order: 2 for Newton's method on the rate, 1 for gradient descent on it.
      meta_rate: α > 0 of order 1, in units of η per unit of f'; usually below η₀. The paper's
        are 1e-9 (Boston Housing, η₀ = 1e-7) and 1e-6 (MNIST).
      derivatives: ``"exact"``, ``"finite_differences"`` (the paper's five loss values),
        ``"successive_gradients"`` (order 1 without a probe). To configure them, pass an
        ``ExactDerivatives``, a ``FiniteDifferences`` or a ``SuccessiveGradients``, or a mapping
        (``{"name": "finite_differences", "step": 1e-2}``).
      rate_momentum: β in [0, 1) of the rate's own momentum, v ← βv + Δη, η ← η + v (eq. 20-21).
      every: steps between updates of the rate, ≥ 1; the steps between cost what plain SGD does.
      lag: True to apply a new rate from the next step on, as published; False to apply it at once.
        It has then not been probed: where f is almost straight, bound it by the safeguards'
        ``ceiling``. Ignored with ``"successive_gradients"``, whose rates are applied at once.
      probe: the name of the extra argument that holds the loss to probe,
        ``value_fn(params) -> scalar``. The default is the loss of the training batch. Pass a
        ``jax.tree_util.Partial`` over a validation batch (eq. 22-23) or over part of the batch
        under a name of your own.
      safeguards: what to do where Newton's rule fails: ``"on"``, a ``RateSafeguards`` or a mapping
        of its fields. ``"off"`` or None is the paper's bare rule, whose only safeguard is the
        floor of 1e-6.

    Returns:
      A transformation. ``update`` reads the extra ``value_fn`` (or the one that ``probe`` names)
      and, where they are given, ``point``, ``value`` and ``grad``. ``point`` is needed under
      ``optax.masked`` and ``optax.partition``, ``grad`` for the safeguard against runaway rates.

    Raises:
      ValueError: an argument is out of range, or ``"successive_gradients"`` with order 2.
      TypeError: ``derivatives`` or ``safeguards`` is of another kind; ``update`` lacks the extra to
        probe or the parameters, or the loss has no forward derivative.

    Cost: exact derivatives take five products per layer, 5/3 of a gradient (2/3 to 1 with order 1);
      finite differences take five forward passes. No memory beyond a forward pass.

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
      rounding noise), safeguards, and f'' = gᵀHg (eq. 11 lacks the trailing g). The lag is an
      option, after Barzilai, Borwein, "Two-point step size gradient methods", 1988.
    """
    derivatives = resolve_derivatives(derivatives, order)
    check_interval("initial_rate", initial_rate, 0.0, open_low=True, remedy="Try 1e-2.")
    check_interval("meta_rate", meta_rate, 0.0, open_low=True)
    _check_course(rate_momentum, every, lag=lag, probe=probe)
    safeguards = resolve_safeguards(safeguards)
    # A comparison of gradients comes a step late: the rate that it moves is applied at once.
    lag = lag and not isinstance(derivatives, SuccessiveGradients)
    compares = safeguards.runaway is not None
    reader = reader_of(derivatives, probe, order=order, every=every, compares=compares)
    rule = RateRule(order, meta_rate, rate_momentum, lag, safeguards)

    def init_fn(params: Any) -> LearnedRateState:
        return _first_state(initial_rate, reader.init_direction(params), every=every)

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        given = admit(updates, state.gradients, squares=False)
        if safeguards.nonfinite is not None:
            updates = given.updates

        # Measure the loss along the ray, where it is due.
        inputs = UpdateInputs(updates, state.direction, params, extras)
        due, may = _is_due(state, every)
        reading = reader.read(inputs, state.next_rate, due=due, may=may)

        # Refresh the rate.
        memory = RateMemory(state.next_rate, state.velocity, state.average_rate)
        outcome = rule.decide(reading, memory).unless(~due, keep_rate(memory))
        if safeguards.nonfinite is not None:
            outcome = _after_fault(outcome, memory, given)
        outcome, state = _bound(outcome, state, inputs, safeguards=safeguards)

        # Apply it.
        state = _advance(state, outcome, reading, due=due, every=every)
        state = state._replace(direction=reader.next_direction(inputs), gradients=given.watch)
        return follow_unless_zero(updates, outcome.applied), state

    return transformation("scale_by_learned_rate", init_fn, update_fn)


def _check_course(rate_momentum: Any, every: Any, *, lag: Any, probe: Any) -> None:
    """Raise where an argument on the course of the rate is out of range or of another kind."""
    check_interval("rate_momentum", rate_momentum, 0.0, 1.0, open_high=True)
    check_count("every", every)
    check_flag("lag", lag)
    check_kind("probe", probe, str)


def _is_due(state: LearnedRateState, every: Any) -> tuple[jax.Array, Any]:
    """Return whether this update probes, and whether it may."""
    may = permitted(state.told, PROBE)
    return (state.count % jnp.asarray(every, jnp.int32) == 0) & may, may


def _after_fault(outcome: Outcome, memory: RateMemory, given: Admitted) -> Outcome:
    """Return the outcome unless the direction was broken, which says nothing of the rate."""
    outcome = outcome.unless(given.failed, keep_rate(memory)._replace(failed=given.failed))
    return outcome.unless(given.bad, refuse_step(memory))


def _bound(
    outcome: Outcome, state: LearnedRateState, inputs: UpdateInputs, *, safeguards: RateSafeguards
) -> tuple[Outcome, LearnedRateState]:
    """Shorten a step that is longer than ``max_step``; the rate that was learned stays."""
    if safeguards.max_step is None:
        return outcome, state
    watch = watch_loss(state.watch, inputs.extras.get("value"), safeguards.max_rise)
    applied, cut = bound_step(
        outcome.applied, inputs.updates, max_step=safeguards.max_step, watch=watch
    )
    state = state._replace(watch=watch, bounded_steps=count_up(state.bounded_steps, cut))
    return outcome._replace(applied=applied), state


def _first_state(initial_rate: Any, direction: Any, *, every: Any) -> LearnedRateState:
    """Return the state before the first update."""

    def rate() -> jax.Array:  # a buffer for each field, so that states can be donated
        return jnp.array(initial_rate, jnp.float32)

    def number() -> jax.Array:
        return jnp.zeros((), jnp.float32)

    def counter() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    return LearnedRateState(
        told=asking(),
        period=period_of(every),
        count=counter(),
        learning_rate=rate(),
        next_rate=rate(),
        average_rate=rate(),
        velocity=number(),
        ray_slope=number(),
        ray_curvature=number(),
        nonconvex_probes=counter(),
        runaway_steps=counter(),
        clipped_rates=counter(),
        bounded_steps=counter(),
        failures=counter(),
        watch=start_watch(),
        gradients=start_gradient_watch(),
        direction=direction,
    )


def _advance(
    state: LearnedRateState, outcome: Outcome, reading: Reading, *, due: jax.Array, every: Any
) -> LearnedRateState:
    """Return the state after one update, but for the direction."""
    refreshed = due & ~outcome.failed & (outcome.next_rate > 0)
    updates_so_far = count_up(state.count // jnp.asarray(every, jnp.int32)) - state.failures
    share = 1 / jnp.clip(updates_so_far, 1, AVERAGED_UPDATES).astype(jnp.float32)
    # Geometric, because rates differ by factors: one that is far too large must not rule the mean.
    average = state.average_rate * (outcome.next_rate / state.average_rate) ** share
    return state._replace(
        told=asking(),
        period=period_of(every),
        count=count_up(state.count),
        learning_rate=outcome.applied,
        next_rate=outcome.next_rate,
        average_rate=jnp.where(refreshed, average, state.average_rate),
        velocity=outcome.velocity,
        ray_slope=jnp.where(due, reading.slope.astype(jnp.float32), state.ray_slope),
        ray_curvature=jnp.where(due, reading.curvature.astype(jnp.float32), state.ray_curvature),
        nonconvex_probes=count_up(state.nonconvex_probes, outcome.nonconvex),
        runaway_steps=count_up(state.runaway_steps, outcome.runaway),
        clipped_rates=count_up(state.clipped_rates, outcome.clipped),
        failures=count_up(state.failures, outcome.failed),
    )
