"""What a run would take, from its first steps."""

import time
from typing import NamedTuple

import jax
import numpy as np

import optalr
from optalr.experiments.training.trainer import Trainer

# The first call is slower than those that follow, and is not counted.
_EPOCHS_TRIED = 3
# A streamed loop is tried for so long.
_SECONDS_TRIED = 5.0


class Estimate(NamedTuple):
    """What a run would take.

    Attributes:
      coverage: how a Kronecker-factored method treats each leaf, as a table.
      parameters: numbers that are trained.
      parameter_bytes: their bytes.
      optimizer_bytes: bytes of the method's state.
      seconds: of training, without compilation and evaluations.
      tried: steps that were taken to know.
    """

    coverage: str
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    seconds: float
    tried: int


def estimate(trainer: Trainer) -> Estimate:
    """Compile a config's training and take some steps; nothing is written.

    Args:
      trainer: the config made ready.
    """
    trainer.compile()
    seed = trainer.config.train.seed
    state = trainer.init(seed)
    leaves = jax.tree.leaves(state.params)
    batch = trainer.dataset.train.take(np.arange(trainer.batch_size))
    table = optalr.coverage(
        trainer.loss_fn, state.params, batch.x, batch.y, state.model_state, trainer.key(seed)
    )
    sizes = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    optimizer_bytes = optalr.state_bytes(state.opt_state)
    paces, tried, began = [], 0, time.monotonic()
    for _ in range(min(_EPOCHS_TRIED, trainer.config.train.epochs)):
        for segment in trainer.segments(state, seed, float("nan")):
            state = segment.state
            steps = len(segment.measured["loss"])
            tried += steps
            paces.append(segment.seconds / steps)
            if time.monotonic() - began > _SECONDS_TRIED:
                break
        if time.monotonic() - began > _SECONDS_TRIED:
            break
    pace = float(np.min(paces))
    return Estimate(str(table), *sizes, optimizer_bytes, pace * trainer.total_steps, tried)
