"""Learning-rate schedules by name, with their milestones in epochs."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from optalr import schedules
from optalr.experiments.configs.calling import call, choose
from optalr.experiments.configs.config import ScheduleConfig
from optalr.experiments.errors import ExperimentError

Schedule = Callable[[jax.Array], jax.typing.ArrayLike]


def constant(learning_rate: float) -> Schedule:
    """Keep the rate constant."""
    return optax.constant_schedule(learning_rate)


def cosine(learning_rate: float, total_steps: int, final_factor: float = 0.0) -> Schedule:
    """Lower the rate along half a cosine, to ``final_factor`` of it at the last step."""
    return optax.cosine_decay_schedule(learning_rate, total_steps, final_factor)


def warmup_cosine(
    learning_rate: float,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float = 1.0,
    final_factor: float = 0.0,
) -> Schedule:
    """Raise the rate linearly over ``warmup_epochs``, then lower it along half a cosine."""
    warmup = max(1, round(warmup_epochs * steps_per_epoch))
    rising = optax.linear_schedule(0.0, learning_rate, warmup)
    falling = optax.cosine_decay_schedule(learning_rate, max(1, total_steps - warmup), final_factor)
    return optax.join_schedules([rising, falling], [warmup])


def steps(
    learning_rate: float,
    *,
    steps_per_epoch: int,
    at_epochs: tuple[float, ...],
    factor: float = 0.1,
) -> Schedule:
    """Multiply the rate by ``factor`` at each of ``at_epochs``."""
    if not isinstance(at_epochs, tuple):
        raise ExperimentError(f"schedule.at_epochs must be a list, got {at_epochs!r}.")
    marks = [round(epoch * steps_per_epoch) for epoch in at_epochs]

    def rate(count: jax.Array) -> jax.Array:
        passed = sum((jnp.asarray(count >= mark, jnp.float32) for mark in marks), jnp.float32(0))
        return jnp.asarray(learning_rate, jnp.float32) * jnp.float32(factor) ** passed

    return rate


def exponential(learning_rate: float, steps_per_epoch: int, decay_per_epoch: float) -> Schedule:
    """Multiply the rate by ``decay_per_epoch`` per epoch, a little at each step."""
    return optax.exponential_decay(learning_rate, steps_per_epoch, decay_per_epoch)


def inverse(learning_rate: float, steps_per_epoch: int, rate_per_epoch: float) -> Schedule:
    """Divide the rate by ``1 + rate_per_epoch`` times the epochs so far."""
    return schedules.inverse_decay(learning_rate, rate_per_epoch / steps_per_epoch)


def halving(learning_rate: float, steps_per_epoch: int, every_epochs: float) -> Schedule:
    """Halve the rate every ``every_epochs``."""
    return schedules.halving(learning_rate, max(1, round(every_epochs * steps_per_epoch)))


def triangular(
    learning_rate: float,
    *,
    steps_per_epoch: int,
    half_cycle_epochs: float,
    lowest_factor: float = 0.1,
) -> Schedule:
    """Let the rate rise from ``lowest_factor`` of it and fall back in straight lines, on and on."""
    half_cycle = max(1, round(half_cycle_epochs * steps_per_epoch))
    return schedules.triangular(lowest_factor * learning_rate, learning_rate, half_cycle)


SCHEDULES: Mapping[str, Callable[..., Schedule]] = MappingProxyType(
    {
        "constant": constant,
        "cosine": cosine,
        "exponential": exponential,
        "halving": halving,
        "inverse": inverse,
        "steps": steps,
        "triangular": triangular,
        "warmup_cosine": warmup_cosine,
    }
)


def build_schedule(
    config: ScheduleConfig, learning_rate: float, *, steps_per_epoch: int, total_steps: int
) -> Schedule:
    """Return the schedule that ``config`` names, a function from step to rate.

    Args:
      config: the ``[schedule]`` section.
      learning_rate: the rate that it changes; may be traced.
      steps_per_epoch: turns epochs into steps.
      total_steps: length of the training.

    Raises:
      ExperimentError: an unknown name or argument.
    """
    return call(
        choose(SCHEDULES, config.name, key="schedule.name"),
        config.options,
        section="schedule",
        learning_rate=learning_rate,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
