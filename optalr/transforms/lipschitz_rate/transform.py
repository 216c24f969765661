"""A learning rate of one over the loss's Lipschitz constant, measured while training.

The constant is that of the last layer's weights (``optalr.lipschitz_constant`` has the formulas);
what it takes is the norm of that layer's input, which the capture of signals has already:
``‖a‖_F² = N T tr(A)``, with A the second moment of the input (Yedida & Saha, "A novel adaptive
learning rate scheduler for deep neural networks").
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count, check_interval, is_concrete, require_extra
from optalr.arrays import all_finite, wide_dtype
from optalr.signals.lipschitz import (
    canonical_loss,
    largest_weight_norm,
    lipschitz_constant,
    lipschitz_scale,
)
from optalr.signals.moments import LayerMoments, is_moments
from optalr.transforms.lipschitz_rate.guards import LipschitzGuards, resolve_guards
from optalr.transforms.loss_watch import LossWatch, bound_step, start_watch, watch_loss

_NAME = "scale_by_lipschitz_rate"


class LipschitzRateState(NamedTuple):
    """State of ``scale_by_lipschitz_rate``; scalars, float32 unless said otherwise.

    Attributes:
      count: int32, updates so far.
      learning_rate: the rate applied by the last update (the warm-up rate before the first).
      lipschitz_constant: L, the constant that rate was computed from; 0 before a measurement.
      activation_norm: K_z, the largest so far in this epoch.
      loss_bound: the largest so far in this epoch of L without its weight decay term.
      square_bound: likewise of the bound on the squared gradient, for Adam.
      square_constant: the bound on the squared gradient in force, for Adam.
      average: K, the moving average of L with momentum (K₁ for Adam).
      square_average: K₂ for Adam.
      watch: what the guard on steps remembers of the loss.
      guarded_rates: int32, updates whose rate a guard decided.
      failures: int32, measurements or directions that were not finite.
      wants_signals: bool, always True: the next update reads the last layer's moments.
    """

    count: jax.Array
    learning_rate: jax.Array
    lipschitz_constant: jax.Array
    activation_norm: jax.Array
    loss_bound: jax.Array
    square_bound: jax.Array
    square_constant: jax.Array
    average: jax.Array
    square_average: jax.Array
    watch: LossWatch
    guarded_rates: jax.Array
    failures: jax.Array
    wants_signals: jax.Array


@dataclasses.dataclass(frozen=True)
class _Formula:
    """The arguments of ``scale_by_lipschitz_rate`` that the constant depends on."""

    loss: str
    num_classes: Any
    weight_decay: Any
    target_norm: Any
    last_layer: str | None
    squares: bool


class _Measured(NamedTuple):
    """One minibatch: K_z, L without decay, the bound on squares, and whether any were measured."""

    activation_norm: jax.Array
    loss_bound: jax.Array
    square_bound: jax.Array
    present: jax.Array
    finite: jax.Array


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
    initialization (equal class probabilities), it looks at the last layer alone, and it takes the
    largest number in the error ``∂E/∂z`` for the norm of that m-row matrix, which makes it smaller
    by up to √m. Logistic regression trains at the rate 1/L; deeper nets break down at it where
    their activations change quickly. The default guard ``max_step`` keeps them alive.

    Args:
      loss: ``"softmax_cross_entropy"``, ``"binary_cross_entropy"`` (means over the batch) or
        ``"least_squares"`` (``‖a − y‖² / 2m``).
      num_classes: k >= 2, for softmax cross-entropy.
      weight_decay: λ >= 0 of the L2 penalty in the loss or in the chain, as in g + λw; the
        weights are the leaves with two axes or more. It is not added to the update here.
      target_norm: ‖y‖ of a minibatch, for least squares; or pass it to ``update`` as an extra.
      averages: ``()`` where u is the gradient. ``(β,)`` where u is an average of gradients,
        v ← βv + (1−β)g: K ← βK + (1−β)L at every step, η = 1/K. ``(β₁, β₂)`` where u is Adam's
        direction: η = (√K₂ + 1e-8) / K₁ with K₁ the average of L and K₂ that of a bound on the
        squared gradient, c²‖a∘a‖_F / m² + 2λ max‖W‖ c K_z / m, both without their bias.
      steps_per_epoch: 1 takes each minibatch's own L. Else, as in the paper, the rate changes once
        an epoch, with the largest K_z of the epoch that ended; in the first epoch it follows the
        largest so far.
      last_layer: key path (``jax.tree_util.keystr``) of the last layer's kernel; None for the layer
        that is executed last.
      guards: ``"on"``, a ``LipschitzGuards`` or a mapping of its fields; ``"off"`` for the paper's
        own rule, 1/L whatever comes of it.

    Returns:
      A transformation. ``update`` reads the extras ``head`` (``signals`` with ``last_layer``), with
      weight decay ``point``, and for least squares ``outputs`` (of ``optalr.composite_loss``); the
      guard on steps reads ``value``, if it is there.
      For Adam ``activations``, if you pass them, give ‖a∘a‖_F exactly; else its lower bound
      ``√(NT Σ_j A_jj²)`` is taken, which errs towards small rates.

    Raises:
      ValueError: an argument is out of range or missing; ``last_layer`` is no captured layer.
      TypeError: an extra is missing.

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
      sign of ‖y‖ in eq. 9; K_z of an epoch is collected while it is trained on, where theirs takes
      an extra pass before it; the guards.
    """
    formula = _Formula(
        loss=canonical_loss(loss),
        num_classes=num_classes,
        weight_decay=weight_decay,
        target_norm=target_norm,
        last_layer=last_layer,
        squares=len(averages) == 2,
    )
    lipschitz_scale(loss, num_classes)  # refuses what it lacks
    check_interval("weight_decay", weight_decay, 0.0)
    check_count("steps_per_epoch", steps_per_epoch)
    if len(averages) > 2:
        raise ValueError(f"averages must be (), (β,) or (β₁, β₂), got {averages!r}.")
    for decay in averages:
        check_interval("averages", decay, 0.0, 1.0, open_high=True)
    guards = resolve_guards(guards)

    def init_fn(params: Any) -> LipschitzRateState:
        del params
        zeros: dict[str, Any] = {
            name: jnp.zeros((), jnp.float32) for name in LipschitzRateState._fields
        }
        counts = ("count", "guarded_rates", "failures")
        zeros |= {name: jnp.zeros((), jnp.int32) for name in counts}
        return LipschitzRateState(**zeros)._replace(
            learning_rate=jnp.array(guards.warmup_rate, jnp.float32),
            watch=start_watch(),
            wants_signals=jnp.ones((), bool),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extras: Any
    ) -> tuple[Any, LipschitzRateState]:
        # Measure.
        measured = _measure(formula, extras)
        finite = all_finite(updates)
        failed = (measured.present & ~measured.finite) | ~finite

        # Refresh.
        state = _collect(state, measured, formula, steps_per_epoch, extras.get("point", params))
        state = _average(state, averages)
        watch = watch_loss(state.watch, extras.get("value"), guards.max_rise)
        rate, guarded = _rate(state, averages, guards)
        if guards.max_step is not None:
            rate, too_long = bound_step(rate, updates, guards.max_step, watch)
            guarded |= too_long

        # Apply. A direction that is not finite is not followed.
        state = state._replace(
            count=optax.safe_increment(state.count),
            watch=watch,
            learning_rate=jnp.where(finite, rate, 0),
            guarded_rates=state.guarded_rates + guarded,
            failures=state.failures + failed,
        )
        return jax.tree.map(lambda u: _scale(u, state.learning_rate), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _measure(formula: _Formula, extras: Mapping[str, Any]) -> _Measured:
    """Return what this minibatch says, from the moments of the last layer."""
    moments = _last_layer(formula.last_layer, dict(extras))
    second_moment = moments.rows if moments.input_side == "rows" else moments.cols
    energies = jnp.diagonal(second_moment, axis1=-2, axis2=-1)
    rows = moments.count * moments.positions
    present = rows > 0
    norm = jnp.sqrt(rows * jnp.max(jnp.sum(energies, axis=-1)))
    size = jnp.where(present, rows, 1)
    output_norm = target_norm = None
    if formula.loss == "least_squares":
        remedy = (
            "Give the loss as optalr.composite_loss(predict_fn, output_loss) to "
            "optalr.value_grad_and_extras."
        )
        outputs = require_extra(dict(extras), "outputs", _NAME, remedy)
        output_norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), outputs))
        target_norm = extras.get("target_norm", formula.target_norm)
        if target_norm is None:
            target_norm = require_extra(
                dict(extras),
                "target_norm",
                _NAME,
                "Pass it to update as target_norm=, or once to the optimizer: the norm ‖y‖ of a "
                "minibatch of targets.",
            )
    bound = lipschitz_constant(
        formula.loss,
        norm,
        size,
        num_classes=formula.num_classes,
        output_norm=output_norm,
        target_norm=target_norm,
    )
    squared = jnp.zeros_like(bound)
    if formula.squares:
        if extras.get("activations") is not None:
            square_norm = jnp.sqrt(jnp.sum(extras["activations"].astype(jnp.float32) ** 4))
        else:
            square_norm = jnp.sqrt(rows * jnp.max(jnp.sum(energies**2, axis=-1)))
        factor = jnp.where(norm > 0, bound / jnp.where(norm > 0, norm, 1), 0)  # c / m
        squared = factor**2 * square_norm
    usable = jnp.isfinite(bound) & jnp.isfinite(squared) & (bound > 0)
    return _Measured(norm, bound, squared, present, usable)


def _last_layer(name: str | None, extras: dict[str, Any]) -> LayerMoments:
    if name is None:
        remedy = "" if "head" not in extras else "No layer was found in the loss: see coverage."
        return require_extra(extras, "head", _NAME, remedy)
    signals = require_extra(extras, "signals", _NAME)
    leaves, _ = jax.tree_util.tree_flatten_with_path(signals, is_leaf=is_moments)
    layers = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if is_moments(leaf)}
    if name not in layers:
        raise ValueError(
            f"last_layer must be the key path of a captured kernel, one of {', '.join(layers)}; "
            f"got {name!r}."
        )
    return layers[name]


def _collect(
    state: LipschitzRateState, measured: _Measured, formula: _Formula, period: Any, weights: Any
) -> LipschitzRateState:
    """Take a measurement in, and replace the constant where an epoch has ended."""
    period = jnp.asarray(period, jnp.int32)
    usable = measured.present & measured.finite
    begins, first = state.count % period == 0, state.count < period
    ended = begins & ~first & (state.loss_bound > 0) & (period > 1)
    # The largest of this epoch, afresh from its first minibatch on (if that is of use).
    names = ("activation_norm", "loss_bound", "square_bound")
    largest = {}
    for name in names:
        before = jnp.where(begins & usable, 0, getattr(state, name))
        largest[name] = jnp.where(
            usable, jnp.maximum(before, getattr(measured, name)), before
        ).astype(jnp.float32)
    current = usable & (first | (period == 1))
    bound = jnp.where(ended, state.loss_bound, largest["loss_bound"])
    square = jnp.where(ended, state.square_bound, largest["square_bound"])
    renew = ended | current

    def compute(old: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        decayed = 0.0
        if not (is_concrete(formula.weight_decay) and float(formula.weight_decay) == 0):
            if weights is None:
                raise TypeError(f"{_NAME} needs params with weight_decay: tx.update(g, s, params).")
            decayed = formula.weight_decay * largest_weight_norm(weights)
        constant = (bound + decayed).astype(jnp.float32)
        squared = (square + 2 * decayed * bound).astype(jnp.float32)
        good = jnp.isfinite(constant) & jnp.isfinite(squared)
        return jnp.where(good, constant, old[0]), jnp.where(good, squared, old[1])

    old = state.lipschitz_constant, state.square_constant
    constant, square_constant = jax.lax.cond(renew, compute, lambda kept: kept, old)
    return state._replace(lipschitz_constant=constant, square_constant=square_constant, **largest)


def _average(state: LipschitzRateState, averages: tuple[float, ...]) -> LipschitzRateState:
    """Advance the moving averages of the constants, once something is known."""
    known = state.lipschitz_constant > 0
    now = {"average": state.lipschitz_constant, "square_average": state.square_constant}
    for (name, value), decay in zip(now.items(), averages, strict=False):
        old = getattr(state, name)
        advanced = jnp.where(known, decay * old + (1 - decay) * value, old).astype(jnp.float32)
        state = state._replace(**{name: advanced})
    return state


def _rate(
    state: LipschitzRateState, averages: tuple[float, ...], guards: LipschitzGuards
) -> tuple[jax.Array, jax.Array]:
    """Return the rate, and whether a bound on it or the warm-up decided it."""
    if not averages:
        raw = 1 / state.lipschitz_constant
    elif len(averages) == 1:
        raw = 1 / state.average
    else:
        # As Adam's own, the averages are freed of their bias towards zero.
        steps = (state.count + 1).astype(jnp.float32)
        first, second = (1 - jnp.float32(decay) ** steps for decay in averages)
        raw = (jnp.sqrt(state.square_average / second) + 1e-8) / (state.average / first)
    early = (state.count < guards.warmup_steps) | ~(state.lipschitz_constant > 0)
    rate = jnp.clip(jnp.where(early, guards.warmup_rate, raw), guards.min_rate, guards.max_rate)
    return rate.astype(jnp.float32), early | (rate != raw)


def _scale(update: jax.Array, rate: jax.Array) -> jax.Array:
    """Return ``−rate · update`` in its dtype; zero where the rate is, finite update or not."""
    dtype = wide_dtype(update)
    scaled = -rate.astype(jnp.finfo(dtype).dtype) * update.astype(dtype)
    return jnp.where(rate == 0, 0, scaled).astype(update.dtype)
