"""How near SWATS comes to its switch: the gap between the projected rate and its mean, by step.

    python benchmarks/swats_gap.py configs/fashion_swats/paper.toml --seeds 3

It trains as the config says, a config of ``paper.swats``, and computes γ from each step p and its
gradient g. The gap is |λ/(1 − β₂ᵏ) − γ|, which has to fall below ε for the switch. The table says
of each seed how large γ was, how small the gap became, and in which step it first fell below each
tolerance.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optalr.experiments.configs.config import Config
from optalr.experiments.configs.files import load_config
from optalr.experiments.training.steps import Batch, make_step
from optalr.experiments.training.trainer import Trainer

TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HEADS = (
    "seed",
    "steps of Adam",
    "γ: smallest, quartiles, largest",
    "gap in the last tenth, median",
    "smallest",
    "smallest of all",
    "steps below 1e-3",
)


class Watched(NamedTuple):
    """The state of a method, beside what its last step p projected on its gradient gives."""

    inner: Any
    gamma: jax.Array  # (), pᵀp / (−pᵀg)


def watched(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Return the method, with γ of its last step in its state."""

    def init(params: Any) -> Watched:
        return Watched(tx.init(params), jnp.zeros(()))

    def update(grads: Any, state: Watched, params: Any = None, **extras: Any) -> Any:
        step, inner = tx.update(grads, state.inner, params, **extras)
        along = optax.tree.vdot(step, grads)
        return step, Watched(inner, optax.tree.vdot(step, step) / -along)

    return optax.GradientTransformationExtraArgs(init, update)


def known(state: Any, field: str) -> jax.Array:
    """Return a field of the method's state."""
    return optax.tree_utils.tree_get(state.opt_state.inner, field)


def gaps(config: Config, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Train once; return γ and the gap of every step, and how many steps Adam took."""
    trainer = Trainer(config)
    trainer.tx = watched(trainer.tx)
    step = make_step(trainer.loss_fn, trainer.tx, trainer.objective, augment=trainer.augment)
    x, y = trainer.data()

    @jax.jit
    def epoch(state: Any, key: jax.Array, indices: jax.Array) -> Any:
        def one(state: Any, chosen: jax.Array) -> Any:
            state, _ = step(state, key, Batch(x[chosen], y[chosen], jnp.float32(jnp.nan)))
            mean = known(state, "projected_rate") / (1 - jnp.float32(0.999) ** state.step)
            return state, (state.opt_state.gamma, jnp.abs(mean - state.opt_state.gamma))

        return jax.lax.scan(one, state, indices)

    state, found = trainer.init(seed), []
    for number in range(config.train.epochs):
        state, measured = epoch(state, trainer.key(seed), trainer.order(seed, number))
        found.append(np.array(measured))
    gamma, gap = np.concatenate(found, axis=1)
    return gamma, gap, len(gap) - int(known(state, "steps_since_switch"))


def described(gamma: np.ndarray, gap: np.ndarray) -> list[str]:
    """Return what a row says of a run of Adam, from its second step on."""
    spread = ", ".join(f"{q:.2g}" for q in np.quantile(gamma, [0, 0.25, 0.5, 0.75, 1]))
    firsts = [str(np.argmax(gap < t) + 2) if (gap < t).any() else "never" for t in TOLERANCES]
    late = gap[-len(gap) // 10 :]
    near = f"{np.mean(gap < 1e-3):.2%}"
    sizes = [f"{np.median(late):.2g}", f"{late.min():.2g}", f"{gap.min():.2g}"]
    return [spread, *sizes, near, *firsts]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", help="a config of paper.swats, with β₂ = 0.999")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    firsts = [f"first below {tolerance:.0e}" for tolerance in TOLERANCES]
    heads = [*HEADS, *firsts]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for seed in range(arguments.seeds):
        gamma, gap, steps = gaps(load_config(arguments.config), seed)
        cells = [str(seed), str(steps), *described(gamma[1:steps], gap[1:steps])]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
