"""The runner's throughput beside that of a bare loop written by hand for the same training.

Both run in alternating pairs in one process and are timed from the end of the first epoch to that
of the last, the runner with all that it records. Wall seconds are what a user waits; seconds of the
processor are less disturbed by other programs. Run it from the repository's root:

    python benchmarks/runner.py [--model mlp|cnn] [--pairs 7]
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optalr.experiments.configs.config import Config, from_table
from optalr.experiments.records.run_folder import RunFolder
from optalr.experiments.training.loop import train
from optalr.experiments.training.trainer import Trainer

MODELS = {
    "mlp": {"name": "mlp", "hidden": [256, 128]},
    "cnn": {"name": "cnn", "widths": [16, 32]},
}


def config(model: str, epochs: int) -> Config:
    return from_table(
        {
            "data": {"name": "mnist_5k", "validation_fraction": 0.0},
            "model": MODELS[model],
            "method": {"name": "adam", "learning_rate": 1e-3},
            "train": {"epochs": epochs, "evaluate_every": epochs},
            "record": {"checkpoint_every": epochs},
        }
    )


def bare_loop(trainer: Trainer):
    """Return a function that trains as the runner does, and nothing else."""
    tx = optax.adam(1e-3)
    data = trainer.dataset
    module = trainer.model.module

    def loss_fn(params, x, y):
        logits = module.apply({"params": params}, data.prepare(x), train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), (logits.argmax(-1) == y).mean()

    def step(carry, x, y):
        params, opt_state = carry
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), (loss, accuracy)

    def epoch(carry, x, y, indices):
        return jax.lax.scan(lambda c, i: step(c, x[i], y[i]), carry, indices)

    compiled_epoch = jax.jit(epoch, donate_argnums=0)
    compiled_step = jax.jit(step, donate_argnums=0)
    x, y = jnp.asarray(data.train.x), jnp.asarray(data.train.y)

    def run():
        params, _ = trainer.model.init(jax.random.key(0))
        carry = params, tx.init(params)
        times = []
        for number in range(trainer.config.train.epochs):
            order = np.random.default_rng(number).permutation(len(x))
            size = trainer.batch_size
            indices = order[: len(x) // size * size].reshape(-1, size).astype(np.int32)
            if trainer.scans:
                carry, measured = compiled_epoch(carry, x, y, indices)
            else:
                measured = []
                for chosen in indices:
                    batch = data.train.x[chosen], data.train.y[chosen]
                    carry, one = compiled_step(carry, *batch)
                    measured.append(one)
            jax.device_get(measured)
            jax.block_until_ready(carry)
            times.append(clocks())
        return times[-1] - times[0]

    return run


def runner(trainer: Trainer) -> np.ndarray:
    """Train into a folder and return the seconds between the first epoch's end and the last's."""
    times = []

    def report(row):
        if row["step"] % trainer.steps_per_epoch == 0:
            times.append(clocks())

    with tempfile.TemporaryDirectory() as folder:
        train(trainer, RunFolder.create(Path(folder) / "run", trainer.config), report)
    return times[-1] - times[0]


def clocks() -> np.ndarray:
    """Return wall and processor seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="mlp")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    trainer = Trainer(config(arguments.model, arguments.epochs))
    trainer.compile()
    bare = bare_loop(trainer)
    bare(), runner(trainer)
    pairs = np.array([(bare(), runner(trainer)) for _ in range(arguments.pairs)])
    for i, clock in enumerate(("wall", "processor")):
        theirs, ours = pairs[:, 0, i], pairs[:, 1, i]
        ratios = ours / theirs
        print(
            f"{arguments.model}, {arguments.epochs - 1} epochs of {trainer.steps_per_epoch} steps, "
            f"{clock} seconds: bare {np.median(theirs):.3f}, runner {np.median(ours):.3f}, median "
            f"ratio {np.median(ratios):.3f} (from {ratios.min():.3f} to {ratios.max():.3f})"
        )


if __name__ == "__main__":
    main()
