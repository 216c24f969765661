"""What Kronecker factors are worth as MINRES's preconditioner, on the full-batch fit of digits.

    python benchmarks/preconditioned.py

At the start, and after 10 and 20 steps of the damped flow with five Krylov steps, the same system
``(G + λI) v = ∇`` is solved with and without them. It prints the plain norm of the residual over
that of the gradient, and how far the quadratic model falls along the solution.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import optax

import optalr
from optalr.experiments.configs.files import load_config
from optalr.experiments.training.trainer import Trainer

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs/edf_fit/edf_g_k10_damped.toml"
COUNTS = (1, 2, 5)


def problem():
    """Return the parameters and the full-batch loss of the config, seed 0."""
    trainer = Trainer(load_config(CONFIG))
    state = trainer.init(0)
    x, y = trainer.data()
    x = trainer.dataset.prepare(x)

    def predict(params, x, y):
        return trainer.model.apply(params, state.model_state, x)[0]

    def output_loss(outputs, x, y):
        return trainer.objective.loss(outputs, y)

    return state.params, optalr.composite_loss(predict, output_loss), (x, y)


def measure(evaluate, params, data, *, factor):
    """Return the loss, λ, and ``(residual, fall)`` of the solves, plain and preconditioned."""
    value, grads, extras = evaluate(params, *data)
    norm = optax.tree.norm(grads)
    damping = factor * norm
    found = []
    for preconditioner in (None, optalr.kronecker_preconditioner()(extras, damping)):
        for k in COUNTS:
            solved = optalr.linalg.minres(
                extras["gauss_newton"],
                grads,
                num_steps=k,
                damping=damping,
                preconditioner=preconditioner,
            )
            image = jax.tree.map(jnp.subtract, grads, solved.residual)
            slope = optax.tree.vdot(grads, solved.solution)
            fall = slope - 0.5 * optax.tree.vdot(solved.solution, image)
            found.append((optax.tree.norm(solved.residual) / norm, fall))
    return value, damping, found


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    params, loss_fn, data = problem()
    evaluate = optalr.value_grad_and_extras(loss_fn)
    tx = optalr.edf(1.0, num_steps=5)

    @jax.jit
    def step(params, state, data):
        _, grads, extras = evaluate(params, *data, signals=False)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    solve = jax.jit(lambda params, data, factor: measure(evaluate, params, data, factor=factor))
    state = tx.init(params)
    print(f"residual, and fall of the model, at k = {COUNTS}: plain, then preconditioned")
    for count in range(21):
        for factor in (1.0, 0.01) if count % 10 == 0 else ():
            value, damping, found = solve(params, data, jnp.float32(factor))
            cells = [f"{float(r):.2f}, {float(f):.2g}" for r, f in found]
            print(
                f"step {count}, loss {float(value):.3g}, damping {float(damping):.2g}: "
                + "; ".join(cells[: len(COUNTS)])
                + "  |  "
                + "; ".join(cells[len(COUNTS) :])
            )
        params, state = step(params, state, data)


if __name__ == "__main__":
    main()
