"""The Lipschitz constant in force: each minibatch's own, or the largest of the last epoch."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import is_concrete
from optalr.clocks import MEASURE, REFRESH, larger, run_when
from optalr.signals.lipschitz import largest_weight_norm
from optalr.transforms.lipschitz_rate.observing import METHOD, Measurement


class Constants(NamedTuple):
    """What is known of the constant: float32 scalars."""

    lipschitz_constant: jax.Array  # L in force; 0 before a measurement
    activation_norm: jax.Array  # K_z, the largest so far in this epoch
    loss_bound: jax.Array  # the largest so far in this epoch of L without its weight decay term
    square_bound: jax.Array  # likewise of the bound on the squared gradient
    square_constant: jax.Array  # the bound on the squared gradient in force


class EpochClock(NamedTuple):
    """When the constant may be replaced: in the whole first epoch, and as others begin."""

    count: Any  # () int32, updates so far
    period: Any  # () int32, updates of an epoch

    @property
    def is_certain(self) -> Any:
        """Whether the period is known: it is not in some states that an older release saved."""
        return self.period > 0

    def begins_epoch(self) -> Any:
        """Return whether the next update is the first of an epoch."""
        return self.count % larger(self.period, 1) == 0

    def is_first_epoch(self) -> Any:
        """Return whether the next update belongs to the first epoch."""
        return self.count < self.period

    def needs(self) -> Any:
        """Return what every update does, and whether the next may replace the constant."""
        return MEASURE | REFRESH * (self.begins_epoch() | self.is_first_epoch())

    def after(self, told: Any) -> "EpochClock":
        """Return the clock an update later."""
        del told
        return self._replace(count=self.count + 1)


@dataclasses.dataclass(frozen=True)
class Epochs:
    """When a new constant takes over; the arguments are those of ``scale_by_lipschitz_rate``."""

    weight_decay: Any

    def advance(
        self, known: Constants, measured: Measurement, *, clock: EpochClock, weights: Any, may: Any
    ) -> Constants:
        """Take a measurement in, and replace the constant where an epoch has ended.

        Args:
          known: what was known before.
          measured: the minibatch of this update.
          clock: of the updates and the epochs.
          weights: the parameters, read with weight decay only.
          may: whether the constant may be replaced; a NumPy bool where that is known.
        """
        period = clock.period
        begins, first = clock.begins_epoch(), clock.is_first_epoch()
        ended = begins & ~first & (known.loss_bound > 0) & (period > 1)
        largest = _largest(known, measured, fresh=begins & measured.usable)
        # The first epoch has no epoch before it, so it follows the largest so far.
        renew = ended | (measured.usable & (first | (period == 1)))
        bound = jnp.where(ended, known.loss_bound, largest.loss_bound)
        square = jnp.where(ended, known.square_bound, largest.square_bound)

        def compute(old: Any, weights: Any) -> tuple[jax.Array, jax.Array]:
            decayed = self._decayed(weights)
            constant = (bound + decayed).astype(jnp.float32)
            squared = (square + 2 * decayed * bound).astype(jnp.float32)
            good = jnp.isfinite(constant) & jnp.isfinite(squared)
            return jnp.where(good, constant, old[0]), jnp.where(good, squared, old[1])

        # Not always, because the norms of all weights are a pass over the parameters.
        old = known.lipschitz_constant, known.square_constant
        constant, squared = run_when(renew, compute, old, inputs=weights, may=may)
        return largest._replace(lipschitz_constant=constant, square_constant=squared)

    def _decayed(self, weights: Any) -> Any:
        """Return the weight decay term λ max_l ‖W_l‖ of L."""
        if is_concrete(self.weight_decay) and float(self.weight_decay) == 0:
            return 0.0
        if weights is None:
            raise TypeError(f"{METHOD} needs params with weight_decay: tx.update(g, s, params).")
        return self.weight_decay * largest_weight_norm(weights)


def _largest(known: Constants, measured: Measurement, *, fresh: jax.Array) -> Constants:
    """Return the largest so far in this epoch; ``fresh`` says that it has no earlier usable one."""

    def larger(before: jax.Array, now: jax.Array) -> jax.Array:
        before = jnp.where(fresh, 0, before)
        after = jnp.where(measured.usable, jnp.maximum(before, now), before)
        return after.astype(jnp.float32)

    return known._replace(
        activation_norm=larger(known.activation_norm, measured.activation_norm),
        loss_bound=larger(known.loss_bound, measured.loss_bound),
        square_bound=larger(known.square_bound, measured.square_bound),
    )
