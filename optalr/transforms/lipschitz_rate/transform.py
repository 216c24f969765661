"""A learning rate of one over the loss's Lipschitz constant, measured while training.

The constant is that of the last layer's weights (``optalr.lipschitz_constant`` has the formulas).
It takes the norm of that layer's input, which the capture of signals has already:
``‖a‖_F² = N T tr(A)``, with A the second moment of the input (Yedida & Saha, "A novel adaptive
learning rate scheduler for deep neural networks").
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count, check_interval, check_kind
from optalr.clocks import REFRESH, asking, period_of, permitted
from optalr.signals.lipschitz import lipschitz_scale
from optalr.states import count_up
from optalr.transforms.lipschitz_rate.averages import Averages, rate_for
from optalr.transforms.lipschitz_rate.constants import Constants, EpochClock, Epochs
from optalr.transforms.lipschitz_rate.guards import LipschitzGuards, bound_rate, resolve_guards
from optalr.transforms.lipschitz_rate.observing import Gauge, Measurement, further_norms
from optalr.transforms.shared.gradient_watch import GradientWatch, admit, start_gradient_watch
from optalr.transforms.shared.lengths import follow_unless_zero
from optalr.transforms.shared.loss_watch import LossWatch, bound_step, start_watch, watch_loss
from optalr.transforms.shared.making import transformation


class LipschitzRateState(NamedTuple):
    """State of ``scale_by_lipschitz_rate``."""

    # every update
    count: jax.Array  # () int32, updates so far
    learning_rate: jax.Array  # () float32, the rate applied last; before, the warm-up rate
    # every measurement, or once an epoch
    lipschitz_constant: jax.Array  # () float32, L of that rate; 0 before a measurement
    activation_norm: jax.Array  # () float32, K_z, the largest so far in this epoch
    loss_bound: jax.Array  # () float32, likewise of L without its weight decay term
    square_bound: jax.Array  # () float32, likewise of the bound on the squared gradient, for Adam
    square_constant: jax.Array  # () float32, the bound on the squared gradient in force, for Adam
    # every update once a constant is known
    average: jax.Array  # () float32, K, the moving average of L with momentum; K₁ for Adam
    square_average: jax.Array  # () float32, K₂ for Adam
    # where something is out of bounds
    watch: LossWatch  # what max_step remembers of the loss
    guarded_rates: jax.Array  # () int32, updates whose rate a guard decided
    gradients: GradientWatch  # what is remembered of the directions' lengths
    # () int32, measurements or directions that were not finite, and directions out of proportion
    failures: jax.Array
    # never
    wants_signals: jax.Array  # () bool, always True: every update reads the last layer's moments
    # for whoever runs a program made for one answer of the clock (optalr/clocks.py)
    told: jax.Array  # () int8, -1
    period: jax.Array  # () int32, updates of an epoch

    @property
    def clock(self) -> EpochClock:
        """When the constant may be replaced."""
        return EpochClock(self.count, self.period)


def scale_by_lipschitz_rate(
    loss: str,
    *,
    num_classes: Any = None,
    weight_decay: Any = 0.0,
    target_norm: Any = None,
    averages: tuple[float, ...] = (),
    steps_per_epoch: Any = 1,
    last_layer: str | None = None,
    guards: LipschitzGuards | Mapping[str, Any] | str | None = "on",
) -> optax.GradientTransformationExtraArgs:
    """Multiply by minus one over the loss's Lipschitz constant.

    Choose it as the last link of a chain for a rate that needs no tuning and follows the network's
    activations: large at first, falling as they grow. With ``K_z`` the Frobenius norm of the
    minibatch of last-layer inputs, m its size and λ the weight decay,

        L = c K_z / m + λ max_l ‖W_l‖,    c = (k−1)/k,  1/2  or  K_a + ‖y‖
        w ← w − u / L

    for softmax cross-entropy of k classes, binary cross-entropy and least squares.

    L is not a bound on the gradient, though the paper calls it one. It is the value at
    initialization (equal class probabilities), and it looks at the last layer alone. The formula
    also takes the largest number in the error ``∂E/∂z`` for the norm of that m-row matrix. This
    makes L smaller by up to √m. Logistic regression trains at the rate 1/L; deeper nets break down
    at it where their activations change quickly. The default guard ``max_step`` keeps them alive.

    Args:
      loss: ``"softmax_cross_entropy"``, ``"binary_cross_entropy"`` (means over the batch) or
        ``"least_squares"`` (``‖a − y‖² / 2m``).
      num_classes: k ≥ 2, for softmax cross-entropy.
      weight_decay: λ ≥ 0 of the L2 penalty in the loss or in the chain, as in g + λw; the
        weights are the leaves with two axes or more. It is not added to the update here.
      target_norm: ‖y‖ ≥ 0 of a minibatch, for least squares; or pass it to ``update`` as an extra.
      averages: decays in [0, 1). ``()`` where u is the gradient. ``(β,)`` where u is an average of
        gradients, v ← βv + (1−β)g: K ← βK + (1−β)L at every step, and η = 1/K. ``(β₁, β₂)`` where
        u is Adam's direction: η = (√K₂ + 1e-8) / K₁, both averages without their bias. K₁ is the
        average of L, and K₂ that of a bound on the squared gradient,
        c²‖a∘a‖_F / m² + 2λ max‖W‖ c K_z / m.
      steps_per_epoch: ≥ 1; 1 takes each minibatch's own L. More is the paper's way: the rate
        changes once an epoch, with the largest K_z of the epoch that ended; in the first epoch it
        follows the largest so far.
      last_layer: key path (``jax.tree_util.keystr``) of the last layer's kernel; None for the layer
        that is executed last.
      guards: ``"on"`` or None for the default ones, a ``LipschitzGuards`` or a mapping of its
        fields; ``"off"`` for the paper's own rule: 1/L, whatever comes of it.

    Returns:
      A transformation. ``update`` reads the extra ``head`` (``signals`` with ``last_layer``), with
      weight decay ``point``, and for least squares ``outputs`` (of ``optalr.composite_loss``). The
      guard on steps reads ``value``, if it is there. For Adam you may pass the extra
      ``activations``, which gives ‖a∘a‖_F exactly. Without it the lower bound ``√(NT Σ_j A_jj²)``
      takes its place, which errs towards small rates.

    Raises:
      ValueError: an argument is out of range or missing; ``last_layer`` is no captured layer.
      TypeError: ``guards`` is of another kind; at ``update``, an extra is missing, or (with weight
        decay) the parameters.

    Cost: a trace of the last layer's captured input moment; with ``max_step`` one pass over the
      update, with weight decay one over the parameters for every new rate. No second forward pass.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optalr
      >>> x, y = jnp.eye(4), jnp.array([0, 1, 2, 0])
      >>> cross_entropy = optax.softmax_cross_entropy_with_integer_labels
      >>> evaluate = optalr.value_grad_and_extras(lambda w: cross_entropy(x @ w, y).mean())
      >>> tx = optalr.scale_by_lipschitz_rate("softmax_cross_entropy", num_classes=3)
      >>> w = jnp.zeros((4, 3))
      >>> value, grads, extras = evaluate(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> rate = 3 * 4 / (2 * 2.0)  # km / ((k−1) K_z), K_z = ‖I‖ = 2
      >>> bool(jnp.allclose(optax.apply_updates(w, updates), -rate * grads, rtol=1e-5))
      True

    Reference: Yedida, Saha, "A novel adaptive learning rate scheduler for deep neural networks",
      eq. 9, 15, 20; for momentum and Adam Yedida, Saha, Prashanth, "LipschitzLR: Using
      theoretically computed adaptive learning rates for fast convergence", 2020. Departures: the
      sign of ‖y‖ in eq. 9, and the guards. Our K_z of an epoch is collected while the epoch is
      trained on, and theirs in an extra pass before it.
    """
    lipschitz_scale(loss, num_classes)  # refuses a loss, or classes, for which there is no L
    check_interval("weight_decay", weight_decay, 0.0)
    check_count("steps_per_epoch", steps_per_epoch)
    _check_sources(averages, last_layer, target_norm)
    rate_of, guards = rate_for(averages), resolve_guards(guards)
    norms = further_norms(loss, target_norm)
    gauge = Gauge(loss, num_classes, norms, last_layer, rate_of.wants_squares)
    epochs = Epochs(weight_decay)

    def init_fn(params: Any) -> LipschitzRateState:
        del params
        return _first_state(guards.warmup_rate, steps_per_epoch)

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        # Measure.
        measured = gauge.measure(extras)
        given = admit(updates, state.gradients, squares=False)
        updates = updates if guards.max_step is None else given.updates

        # Refresh the constant and its rate.
        weights = extras.get("point", params)
        state = state._replace(period=period_of(steps_per_epoch))
        known = _renewed(state, measured, epochs, weights=weights)
        averaged = rate_of.advance(Averages(state.average, state.square_average), known)
        raw = rate_of.rate(averaged, known, state.count)
        rate, guarded = bound_rate(raw, guards, count=state.count, known=known)
        watch = watch_loss(state.watch, extras.get("value"), guards.max_rise)
        rate, cut = bound_step(rate, updates, max_step=guards.max_step, watch=watch)

        # Apply. A direction that is not finite is not followed.
        rate = jnp.where(given.bad, 0, rate)
        state = state._replace(**known._asdict(), **averaged._asdict(), watch=watch)
        failed = measured.failed | given.failed
        state = _count(state, rate, guarded=guarded | cut, failed=failed)
        return follow_unless_zero(updates, rate), state._replace(gradients=given.watch)

    return transformation("scale_by_lipschitz_rate", init_fn, update_fn, holds=LipschitzRateState)


def _check_sources(averages: Any, last_layer: Any, target_norm: Any) -> None:
    """Raise where what is averaged, or where a norm comes from, is of another kind."""
    check_kind("averages", averages, tuple)
    check_kind("last_layer", last_layer, str)
    if target_norm is not None:
        check_interval("target_norm", target_norm, 0.0)


def _renewed(
    state: LipschitzRateState, measured: Measurement, epochs: Epochs, *, weights: Any
) -> Constants:
    """Return what is known after a measurement."""
    may = permitted(state.told, REFRESH)
    return epochs.advance(_known(state), measured, clock=state.clock, weights=weights, may=may)


def _count(
    state: LipschitzRateState, rate: jax.Array, *, guarded: jax.Array, failed: jax.Array
) -> LipschitzRateState:
    """Return the state with this update counted, and the rate that it applies."""
    return state._replace(
        told=asking(),
        count=count_up(state.count),
        learning_rate=rate,
        guarded_rates=count_up(state.guarded_rates, guarded),
        failures=count_up(state.failures, failed),
    )


def _known(state: LipschitzRateState) -> Constants:
    """Return the part of the state that measurements change."""
    return Constants(
        lipschitz_constant=state.lipschitz_constant,
        activation_norm=state.activation_norm,
        loss_bound=state.loss_bound,
        square_bound=state.square_bound,
        square_constant=state.square_constant,
    )


def _first_state(rate: float, steps_per_epoch: Any) -> LipschitzRateState:
    """Return the state before the first update."""

    def number() -> jax.Array:  # a buffer for each field, so that states can be donated
        return jnp.zeros((), jnp.float32)

    def counter() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    return LipschitzRateState(
        told=asking(),
        period=period_of(steps_per_epoch),
        count=counter(),
        learning_rate=jnp.array(rate, jnp.float32),
        lipschitz_constant=number(),
        activation_norm=number(),
        loss_bound=number(),
        square_bound=number(),
        square_constant=number(),
        average=number(),
        square_average=number(),
        watch=start_watch(),
        gradients=start_gradient_watch(),
        guarded_rates=counter(),
        failures=counter(),
        wants_signals=jnp.ones((), bool),
    )
