"""The learning rate that a config's problem asks for."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import optalr
from optalr.experiments.configs.config import Config
from optalr.experiments.data import load
from optalr.experiments.errors import ExperimentError
from optalr.experiments.models import build_model
from optalr.experiments.training.objective import OBJECTIVES
from optalr.experiments.training.steps import make_loss

# The examples of all steps are chosen before the first.
_MOST_STEPS = 1_000_000


def suggest_for(
    config: Config, *, starts: Sequence[float], num_steps: int
) -> optalr.RateSuggestion:
    """Run ``optalr.suggest_learning_rate`` on a config's data and model.

    The config's weight decay joins the loss; its method, schedule and augmentation are not used.

    Args:
      config: data, model, batch size, weight decay and seed.
      starts: initial rates, at least two, > 0.
      num_steps: steps from each start.

    Returns:
      The rate where the starts agree, and what each of them did.

    Raises:
      ExperimentError: an argument is out of range.
    """
    if not 1 <= num_steps <= _MOST_STEPS:
        raise ExperimentError(f"--steps must lie between 1 and {_MOST_STEPS}, got {num_steps}.")
    if not all(0 < start < math.inf for start in starts):
        raise ExperimentError(f"--starts must be finite rates above 0, got {list(starts)}.")
    dataset = load(config.data)
    model, objective = build_model(config.model, dataset), OBJECTIVES[dataset.task]
    loss_fn = make_loss(model, objective, dataset)
    key = jax.random.key(config.train.seed)
    params, model_state = model.init(key)
    decay = config.train.weight_decay

    # Decay is a penalty here, because a rate is learned from the slope of the loss it should lower.
    def penalized(params, *args):
        loss, aux = loss_fn(params, *args)
        kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        return loss + 0.5 * decay * sum(jnp.sum(leaf**2) for leaf in kernels), aux

    chosen = _minibatches(config, len(dataset.train), num_steps + 1)

    def batch_at(step):
        part = dataset.train.take(chosen[step])
        return part.x, part.y, model_state, jax.random.fold_in(key, step)

    try:
        return optalr.suggest_learning_rate(
            penalized if decay else loss_fn,
            params,
            batch_at,
            starts=starts,
            num_steps=num_steps,
            has_aux=True,
        )
    except ValueError as error:
        raise ExperimentError(f"suggest-rate: {error}") from error


def _minibatches(config: Config, num_examples: int, at_least: int) -> np.ndarray:
    """Return the examples of each minibatch, in whole epochs, each shuffled anew."""
    random = np.random.default_rng(config.train.seed)
    size = min(config.train.batch_size, num_examples)
    per_epoch = num_examples // size
    num_epochs = -(-at_least // per_epoch)  # rounded up
    orders = [random.permutation(num_examples)[: per_epoch * size] for _ in range(num_epochs)]
    return np.concatenate(orders).reshape(-1, size)
