"""How the logarithm of a decay answers the slope of a validation loss: scalars in, scalars out."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval
from optalr.arrays import all_finite

# A slope is cut to this many times the root mean square of those before. A single broken batch
# would otherwise rule the mean square for hundreds of probes, in which nothing is learned.
_PROPORTION = 10.0


class DecayMemory(NamedTuple):
    """What the rule remembers: float32 scalars, or with a decay for each leaf trees of them."""

    log_factor: Any  # z = log(λ/λ₀)
    slope: Any  # moving average of the slopes
    slope_square: Any  # moving average of their squares


class Moved(NamedTuple):
    """What became of the memory.

    Attributes:
      memory: after the probe; as it was where the probe failed.
      trend: the normalised slopes that z moved by, in [−1, 1]; like ``memory.slope``.
      failed: () bool, whether a slope or its square was not finite.
    """

    memory: DecayMemory
    trend: Any
    failed: jax.Array


@dataclasses.dataclass(frozen=True)
class DecayRule:
    """Normalised gradient descent on z, with momentum; see ``add_learned_decay``."""

    smoothing: Any
    memory: Any
    min_factor: Any
    max_factor: Any

    def __post_init__(self):
        check_interval("smoothing", self.smoothing, 0.0, 1.0, open_high=True)
        check_interval("memory", self.memory, 0.0, 1.0, open_high=True)
        check_interval("min_factor", self.min_factor, 0.0, 1.0, open_low=True)
        check_interval("max_factor", self.max_factor, 1.0)

    def move(self, memory: DecayMemory, slopes: Any, *, probes: jax.Array, rate: Any) -> Moved:
        """Return the memory after one more probe.

        Args:
          memory: before it.
          slopes: what it measured, like ``memory.slope``.
          probes: how many went before, not counting those that failed.
          rate: how far z may move.
        """
        failed = ~all_finite((slopes, jax.tree.map(jnp.square, slopes)))

        def cut(slope: jax.Array, square: jax.Array) -> jax.Array:
            limit = _PROPORTION * jnp.sqrt(square / self._weight(self.memory, probes))
            return jnp.where(limit > 0, jnp.clip(slope, -limit, limit), slope)

        slopes = jax.tree.map(cut, slopes, memory.slope_square)
        means = self._fold(memory.slope, slopes, self.smoothing)
        squares = self._fold(memory.slope_square, jax.tree.map(jnp.square, slopes), self.memory)

        def normalised(mean: jax.Array, square: jax.Array) -> jax.Array:
            mean = mean / self._weight(self.smoothing, probes + 1)
            size = jnp.sqrt(square / self._weight(self.memory, probes + 1))
            return jnp.clip(mean / jnp.where(size > 0, size, 1), -1, 1)

        trend = jax.tree.map(normalised, means, squares)

        low, high = jnp.log(self.min_factor), jnp.log(self.max_factor)

        def moved(z: jax.Array, t: jax.Array) -> jax.Array:
            return jnp.clip(z - rate * t, low, high).astype(z.dtype)

        logs = jax.tree.map(moved, memory.log_factor, trend)
        new = DecayMemory(logs, means, squares)
        kept = jax.tree.map(lambda a, b: jnp.where(failed, b, a), new, memory)
        return Moved(kept, trend, failed)

    def _weight(self, decay: Any, probes: jax.Array) -> jax.Array:
        """Return the sum of a moving average's weights; 1 where there are none."""
        weight = 1 - jnp.float32(decay) ** probes.astype(jnp.float32)
        return jnp.where(probes > 0, weight, 1)

    def _fold(self, old: Any, new: Any, decay: Any) -> Any:
        decay = jnp.asarray(decay, jnp.float32)
        return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)
