"""A rate of one over the Lipschitz constant, with K_z from a pass of its own before an epoch.

Yedida & Saha, "A novel adaptive learning rate scheduler for deep neural networks", eq. 9, 15, 20
and section 7.2.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count, check_flag, check_interval, require_extra
from optalr.arrays import wide_dtype
from optalr.clocks import MEASURE, asking, larger, period_of, smaller
from optalr.linalg.structured import Diagonal, Structured, as_structured
from optalr.signals.lipschitz import canonical_loss, lipschitz_scale
from optalr.signals.moments import LayerMoments
from optalr.states import count_up
from optalr.transforms.published.precision import real_dtype
from optalr.transforms.shared.lengths import follow_unless_zero
from optalr.transforms.shared.making import transformation

_NAME = "paper.lipschitz_sgd"


class PassClock(NamedTuple):
    """When the data are passed through to measure, and when to train: scalars."""

    count: Any  # () int32, updates so far
    period: Any  # () int32, updates of a pass
    repeats: Any  # () int32, 1 for a measuring pass before every epoch, 0 for one at the start

    @property
    def is_certain(self) -> Any:
        """Whether the period is known."""
        return self.period > 0

    @property
    def position(self) -> Any:
        """The next update's place: below ``period`` in a measuring pass, at it a rate is due."""
        around = self.count % larger(2 * self.period, 1)
        # Without repetition the clock stands still once the rate is there.
        return around * self.repeats + smaller(self.count, self.period + 1) * (1 - self.repeats)

    def measures(self) -> Any:
        """Return whether the next update measures, and moves nothing."""
        return self.position < self.period

    def needs(self) -> Any:
        """Return what the next update has to do."""
        return MEASURE * self.measures()

    def after(self, told: Any) -> "PassClock":
        """Return the clock an update later."""
        del told
        return self._replace(count=self.count + 1)


class EpochRateState(NamedTuple):
    """State of ``scale_by_epoch_rate``; scalars in float32, float64 beside such parameters."""

    # every update
    count: jax.Array  # () int32, updates so far, those that measure included
    learning_rate: jax.Array  # (), the rate applied last: 0 while measuring
    wants_signals: jax.Array  # () bool, whether the next update measures
    # every measuring update
    activation_norm: jax.Array  # (), K_z, the largest of this pass
    output_norm: jax.Array  # (), K_a, likewise; least squares only
    batch_size: jax.Array  # (), m, rows of the last layer's input
    # once an epoch
    lipschitz_constant: jax.Array  # (), L in force; 0 before the first
    # for whoever runs a program made for one answer of the clock (optalr/clocks.py)
    told: jax.Array  # () int8, -1
    period: jax.Array  # () int32, updates of a pass
    repeats: jax.Array  # () int32, whether every epoch has a measuring pass

    @property
    def clock(self) -> PassClock:
        """When to measure and when to train."""
        return PassClock(self.count, self.period, self.repeats)


def scale_by_epoch_rate(
    loss: str,
    *,
    steps_per_epoch: Any,
    num_classes: Any = None,
    weight_decay: Any = 0.0,
    target_norm: Any = None,
    every_epoch: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by minus one over L, measured in a pass before each epoch.

    Choose it through ``optalr.paper.lipschitz_sgd``.
    """
    scale = lipschitz_scale(loss, num_classes)
    squares = canonical_loss(loss) == "least_squares"
    check_count("steps_per_epoch", steps_per_epoch)
    check_interval("weight_decay", weight_decay, 0.0)
    check_flag("every_epoch", every_epoch)
    if squares and target_norm is None:
        raise ValueError("target_norm is needed for least squares: L = (K_a + ‖y‖) K_z / m.")
    if target_norm is not None:
        check_interval("target_norm", target_norm, 0.0)
    target = target_norm if squares else None
    rule = _Rule(scale, steps_per_epoch, every_epoch, weight_decay, target)
    return transformation(_NAME, rule.init, rule.update, holds=EpochRateState)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by jit: settings may be arrays
class _Rule:
    """The formula of L, and where its norms come from.

    Attributes:
      scale: the factor of ``K_z/m``: (k−1)/k, 1/2, or 1.
      steps_per_epoch: minibatches of a pass.
      every_epoch: whether a pass comes before every epoch.
      weight_decay: λ.
      target_norm: ‖y‖ for least squares, else None.
    """

    scale: Any
    steps_per_epoch: Any
    every_epoch: bool
    weight_decay: Any
    target_norm: Any

    def init(self, params: Any) -> EpochRateState:
        kind = real_dtype(params)
        return EpochRateState(
            count=jnp.zeros((), jnp.int32),
            learning_rate=jnp.zeros((), kind),
            wants_signals=jnp.ones((), bool),
            activation_norm=jnp.zeros((), kind),
            output_norm=jnp.zeros((), kind),
            batch_size=jnp.ones((), kind),
            lipschitz_constant=jnp.zeros((), kind),
            told=asking(),
            period=period_of(self.steps_per_epoch),
            repeats=jnp.array(self.every_epoch, jnp.int32),
        )

    def update(self, updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        state = self.measured(state._replace(period=period_of(self.steps_per_epoch)), extras)
        due = state.clock.position == state.period
        constant = self.constant(state, extras.get("point", params))
        constant = jnp.where(due, constant, state.lipschitz_constant)
        constant = constant.astype(state.lipschitz_constant.dtype)
        rate = jnp.where(state.clock.measures(), 0, 1 / constant)
        state = state._replace(
            told=asking(),
            count=count_up(state.count),
            learning_rate=rate,
            lipschitz_constant=constant,
        )
        state = state._replace(wants_signals=state.clock.measures())
        return follow_unless_zero(updates, rate), state

    def measured(self, state: EpochRateState, extras: dict[str, Any]) -> EpochRateState:
        """Return the state with the norms of this minibatch, if it is one of a measuring pass."""
        head = _diagonals(require_extra(extras, "head", _NAME), extras.get("measure_head"))
        rows = (head.count * head.positions).astype(state.batch_size.dtype)
        measures, fresh = state.clock.measures() & (rows > 0), state.clock.position == 0

        def largest(before: jax.Array, now: jax.Array) -> jax.Array:
            before = jnp.where(fresh, 0, before)
            return jnp.where(measures, jnp.maximum(before, now.astype(before.dtype)), before)

        norms = {"activation_norm": largest(state.activation_norm, _input_norm(head))}
        if self.target_norm is not None:
            outputs = require_extra(extras, "outputs", _NAME)
            norms["output_norm"] = largest(state.output_norm, _norm([outputs]))
        size = jnp.where(measures, rows, state.batch_size)
        return state._replace(**norms, batch_size=size)

    def constant(self, state: EpochRateState, weights: Any) -> jax.Array:
        """Return L."""
        bound = self.scale * state.activation_norm / state.batch_size
        if self.target_norm is not None:
            bound = bound * (state.output_norm + jnp.asarray(self.target_norm, bound.dtype))
        if isinstance(self.weight_decay, int | float) and self.weight_decay == 0:
            return bound
        if weights is None:
            raise TypeError(f"{_NAME} needs params with weight_decay: tx.update(g, s, params).")
        kernels = [w for w in jax.tree.leaves(weights) if jnp.ndim(w) >= 2]
        largest = jnp.max(jnp.stack([_norm([jnp.asarray(w)]) for w in kernels]))
        return bound + jnp.asarray(self.weight_decay, bound.dtype) * largest.astype(bound.dtype)


def _diagonals(head: LayerMoments, measure: Any) -> LayerMoments:
    """Return the moments of the last layer, their diagonals alone where that can be asked for."""
    if measure is None or isinstance(head.rows, Structured) or isinstance(head.cols, Structured):
        return head
    return measure((Diagonal(head.rows.shape[-1]), Diagonal(head.cols.shape[-1])))


def _input_norm(head: LayerMoments) -> jax.Array:
    """Return ``‖a‖_F = √(N T tr(A))`` of the last layer's input."""
    gram = as_structured(head.rows if head.input_side == "rows" else head.cols)
    energies = gram.diagonal()
    return jnp.sqrt(head.count * head.positions * jnp.max(jnp.sum(energies, -1)))


def _norm(arrays: Any) -> jax.Array:
    """Return the 2-norm of some arrays together, float32 or wider."""
    squares = [jnp.sum(jnp.square(x.astype(wide_dtype(x)))) for x in jax.tree.leaves(arrays)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))
