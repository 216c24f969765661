"""Training many learning rates and seeds at once, as one vectorized program.

``vmap`` runs both branches of a ``cond``. A method that refreshes roots now and then would
therefore do so in every step. Only optax's methods are swept this way, and only where epochs are
scanned.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optalr.experiments.configs.methods import build_method, find_method
from optalr.experiments.training.steps import Batches, TrainState, make_epoch, make_step
from optalr.experiments.training.trainer import Trainer

# Members of one program. A larger grid takes several, so that memory does not grow with it.
_AT_ONCE = 64


def can_sweep(trainer: Trainer) -> bool:
    """Return whether ``train_grid`` serves this trainer's config.

    A phase that reads the validation loss is excluded: every member would need its own evaluation
    between epochs.
    """
    _, origin = find_method(trainer.config.method.name)
    return origin == "optax" and trainer.scans and not trainer.reads_validation


def train_grid(
    trainer: Trainer, rates: Sequence[float], seeds: Sequence[int]
) -> list[list[dict[str, float]]]:
    """Train every rate with every seed, without a record.

    Args:
      trainer: a config for which ``can_sweep`` holds; its own learning rate is not used.
      rates: the learning rates.
      seeds: the seeds.

    Returns:
      For each rate, for each seed: the mean training loss of the last epoch, and the validation
      loss and score; NaN where training diverged.
    """
    members = [(rate, seed) for rate in rates for seed in seeds]
    found: list[dict[str, float]] = []
    for start in range(0, len(members), _AT_ONCE):
        found += _train_members(trainer, members[start : start + _AT_ONCE])
    return [found[i * len(seeds) : (i + 1) * len(seeds)] for i in range(len(rates))]


def _train_members(trainer: Trainer, members: list[tuple[float, int]]) -> list[dict[str, float]]:
    """Train ``(rate, seed)`` members side by side."""
    rates = jnp.array([rate for rate, _ in members], jnp.float32)
    seeds = [seed for _, seed in members]
    keys = jnp.stack([trainer.key(seed) for seed in seeds])

    def method(rate):
        return build_method(
            trainer.config,
            steps_per_epoch=trainer.steps_per_epoch,
            total_steps=trainer.total_steps,
            given=trainer.given,
            learning_rate=rate,
        )

    def init(rate, key):
        params, model_state = trainer.model.init(key)
        return TrainState(params, model_state, method(rate).init(params), jnp.int32(0))

    def epoch(state, member, batches):
        rate, key = member
        indices, x, y = batches
        # The method is built in the program, in which its rate is an array.
        step = make_step(trainer.loss_fn, method(rate), trainer.objective, augment=trainer.augment)
        # No validation loss: `can_sweep` excludes the methods that read it.
        values = jnp.full(indices.shape[:1], jnp.nan, jnp.float32)
        state, measured = make_epoch(step)(state, key, Batches(x, y, indices, values))
        return state, jnp.mean(measured["loss"])

    run = jax.jit(jax.vmap(epoch, in_axes=(0, 0, (0, None, None))), donate_argnums=0)
    states = jax.jit(jax.vmap(init))(rates, keys)
    losses = jnp.zeros(len(members))
    for number in range(trainer.config.train.epochs):
        indices = np.stack([trainer.order(seed, number) for seed in seeds])
        states, losses = run(states, (rates, keys), (indices, *trainer.data()))
    return [
        _outcome(trainer, jax.tree.map(lambda leaf, i=i: leaf[i], states), float(losses[i]))
        for i in range(len(members))
    ]


def _outcome(trainer: Trainer, state: Any, loss: float) -> dict[str, float]:
    """Return what ``tune.train_once`` returns; a loss that is not finite spoils every number."""
    found = {"train_loss": loss, **trainer.evaluate(state, "validation")}
    return found if math.isfinite(loss) else dict.fromkeys(found, math.nan)
