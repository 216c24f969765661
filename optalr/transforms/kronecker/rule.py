"""What an update goes by: the power, the damping, the moving average, and the clock."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arrays import as_vector
from optalr.clocks import MEASURE, REFRESH, REPAIR, larger, permitted, smaller, where
from optalr.linalg import spd
from optalr.linalg.structured import Structured

# How many measurements a refresh interval holds where signals_every is not given. At the default
# decay of 0.95 the average of some 20 batches then spans two intervals.
_MEASUREMENTS_PER_ROOT = 10
# An interval is at most the steps taken so far over this: roots age fast in early training.
_GROWTH = 2

Dampings = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class DampingForm:
    """Where a damping acts.

    Attributes:
      of_means: function of the mean eigenvalues of both factors of all layers, ``(layers,)``, and
        λ that returns what is added to the eigenvalues of each.
      is_relative: whether λ counts in units of the mean eigenvalue.
    """

    of_means: Callable[[jax.Array, jax.Array, jax.Array], Dampings]
    is_relative: bool = False


def _relative(rows: jax.Array, cols: jax.Array, damping: jax.Array) -> Dampings:
    """Return λ times the mean eigenvalue of each factor."""
    alive = (rows > 0) & (cols > 0)
    # A layer that has seen nothing has no scale: its root is the identity.
    return jnp.where(alive, damping * rows, 1), jnp.where(alive, damping * cols, 1)


def _absolute(rows: jax.Array, cols: jax.Array, damping: jax.Array) -> Dampings:
    """Return λ for each factor: the paper's ``Λ + εI``."""
    return jnp.full_like(rows, damping), jnp.full_like(cols, damping)


DAMPING_FORMS: Mapping[str, DampingForm] = MappingProxyType(
    {
        "relative": DampingForm(_relative, is_relative=True),
        "absolute": DampingForm(_absolute),
        "balanced": DampingForm(spd.split_damping_by_means),
    }
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How moments are averaged and what power of them is applied. Numbers may be traced.

    Attributes:
      power: p of the Kronecker product.
      share: s in ``F ≈ (B ⊗ A)^s``: 1 for captured moments, 1/2 for Shampoo's, whose factors make
        ``F ≈ (GᵀG ⊗ GGᵀ)^{1/2}``.
      decay: of the moving averages.
      damping: λ, float32.
      damping_form: where it acts.
    """

    power: Any
    share: float
    decay: Any
    damping: jax.Array
    damping_form: DampingForm

    @property
    def exponent(self) -> Any:
        """The power that each factor takes."""
        return self.power * self.share

    def dampings(
        self, pairs: Sequence[tuple[Structured, Structured]], scale: jax.Array
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Return what is added to the eigenvalues of each factor, ``(layers,)``.

        Args:
          pairs: the factors of all kernels, of which there is at least one.
          scale: what all are to be multiplied by first.
        """
        means, ends = [], []
        for sides in zip(*pairs, strict=True):
            traces = [side.trace() for side in sides]
            sizes = [np.full(t.shape, s.padded_size) for t, s in zip(traces, sides, strict=True)]
            trace = as_vector(traces)
            mean = trace / np.concatenate([n.ravel() for n in sizes]).astype(trace.dtype)
            means.append(mean * scale.astype(mean.dtype))
            ends.append(np.cumsum([t.size for t in traces])[:-1])
        damping = self.damping.astype(means[0].dtype)
        added = self.damping_form.of_means(means[0], means[1], damping)
        rows, cols = map(jnp.split, added, ends)
        return list(zip(rows, cols, strict=True))

    def added(self, values: jax.Array, num_axes: int) -> jax.Array:
        """Return what damping adds to eigenvalues; their mean is taken over the last axes."""
        if not self.damping_form.is_relative:
            return self.damping
        axes = tuple(range(-num_axes, 0))
        return self.damping * jnp.mean(values, axes, keepdims=True)


class Periods(NamedTuple):
    """What a clock goes by, as the state keeps it: scalars."""

    update_every: Any  # int32, updates between two roots, once intervals have stopped growing
    signals_every: Any  # int32, updates between two measurements by then
    full_memory: Any  # float32, measurements after which waiting for more samples is in vain
    warmup: Any  # float32, samples per dimension before the first roots
    min_batches: Any  # int32, batches measured before the first roots
    samples: Any  # float32, samples per dimension in the last measurement; 0 before the first


def periods_of(
    update_every: Any, signals_every: Any, decay: Any, *, warmup: float, min_batches: int
) -> Periods:
    """Return the periods that the arguments of ``scale_by_kronecker`` say; they may be traced."""
    period = jnp.array(update_every, jnp.int32)
    if signals_every is None:
        signals_every = period // _MEASUREMENTS_PER_ROOT
    return Periods(
        update_every=period,
        signals_every=jnp.array(signals_every, jnp.int32),
        # A moving average never holds more than some 1/(1 − decay) batches.
        full_memory=2 / (1 - jnp.asarray(decay, jnp.float32)),
        warmup=jnp.array(warmup, jnp.float32),
        min_batches=jnp.array(min_batches, jnp.int32),
        samples=jnp.zeros([], jnp.float32),
    )


class KroneckerClock(NamedTuple):
    """When to measure and when to take roots: scalars, of jax or of NumPy."""

    count: Any  # int32, updates so far
    signal_age: Any  # int32, updates from the last measurement to the next update
    root_age: Any  # int32, updates since roots were last due
    measurements: Any  # int32, batches measured
    samples: Any  # float32, samples per dimension so far
    num_refreshes: Any  # int32
    missed: Any  # int32, matrices that had no root in the last refresh, or only one by eigh
    periods: Periods

    def measures(self) -> Any:
        """Return whether the next update measures."""
        longest = self.periods.signals_every
        spacing = self._interval() // _MEASUREMENTS_PER_ROOT
        steady = self.count // _GROWTH >= self.periods.update_every
        # While intervals grow, each needs its measurements, whatever signals_every says.
        spacing = where(steady, longest, smaller(spacing, longest))
        return self.signal_age >= larger(spacing, 1)

    def refreshes(self) -> Any:
        """Return whether roots are taken in an update that has measured and aged the roots."""
        seen = self.measurements
        enough = (self.samples >= self.periods.warmup) | (seen >= self.periods.full_memory)
        trusted = enough & (seen >= self.periods.min_batches)
        due = (self.num_refreshes == 0) | (self.root_age >= self._interval())
        return trusted & due

    def needs(self) -> Any:
        """Return what the next update has to do, if its batch is usable."""
        measures = self.measures()
        refreshes = self._measured(measures).refreshes()
        repairs = refreshes & (self.missed > 0)
        return MEASURE * measures | REFRESH * refreshes | REPAIR * repairs

    def after(self, told: Any) -> "KroneckerClock":
        """Return the clock after an update that was told so, and in which all went well."""
        measures = self.measures() & permitted(told, MEASURE)
        after = self._measured(measures)
        refreshes = after.refreshes() & permitted(told, REFRESH)
        return after._replace(
            count=self.count + 1,
            root_age=after.root_age * (1 - refreshes),
            num_refreshes=self.num_refreshes + refreshes,
        )

    @property
    def is_certain(self) -> Any:
        """Whether the periods are known, and how many samples a batch has where that matters."""
        return (self.periods.update_every > 0) & self._is_warm_or_knows_samples()

    def _measured(self, measures: Any) -> "KroneckerClock":
        """Return the clock within an update, after the measurement."""
        # Before the first batch nothing is known of its size: it may suffice for roots.
        known = self._is_warm_or_knows_samples()
        added = where(known, self.periods.samples, self.periods.warmup)
        return self._replace(
            signal_age=where(measures, 1, self.signal_age + 1),
            root_age=self.root_age + 1,
            measurements=self.measurements + measures,
            samples=self.samples + measures * added,
        )

    def _is_warm_or_knows_samples(self) -> Any:
        warm = (self.num_refreshes > 0) | (self.periods.warmup <= 0)
        return warm | (self.periods.samples > 0)

    def _interval(self) -> Any:
        """Return the updates between roots: half the updates so far, at most ``update_every``."""
        return smaller(larger(self.count // _GROWTH, 1), self.periods.update_every)
