"""How far a refreshed eigenbasis may fall behind: the tolerances of ``root_method="eigenbasis"``.

    python benchmarks/warm_basis.py [--update-every 10]

Trains an MLP on scikit-learn's digits with ``scale_by_kronecker`` and keeps the factors and the
gradient at every refresh. Then it takes the roots of that history again, each from the basis of the
one before by one QR step, and decomposes anew where the residual exceeds a tolerance. A row has how
often that was, and how far the direction ``A^{-1/2} G B^{-1/2}`` is from that of full
decompositions (all kernels together): its relative error, and the cosine between both.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optalr
from optalr.linalg import inverse_root, mean_eigenvalue

TOLERANCES = (0.03, 0.1, 0.3, 1.0, 3.0, np.inf)
SIZES = (64, 128, 64, 10)
DAMPING, DECAY = 1e-3, 0.95


def predict(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params, x, y):
    scores = predict(params, x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, y))


def history(update_every, num_steps):
    """Return factors and gradients of all kernels at every refresh, and the last training loss."""
    digits = load_digits()
    x, y = (digits.data / 16).astype(np.float32), digits.target
    keys = jax.random.split(jax.random.key(0), len(SIZES) - 1)
    params = [
        {"w": jax.random.normal(k, (m, n)) * np.sqrt(2 / m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    ]
    evaluate = optalr.value_grad_and_extras(loss_fn)
    tx = optax.chain(
        optalr.scale_by_kronecker(decay=DECAY, damping=DAMPING, update_every=update_every),
        optax.trace(0.9),
        optax.scale_by_learning_rate(1e-2),
    )
    state, rng, found = tx.init(params), np.random.default_rng(0), []

    @jax.jit
    def step(params, state, x, y):
        loss, grads, extras = evaluate(params, x, y, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        moments = [(layer["w"].rows, layer["w"].cols) for layer in extras["signals"]]
        return optax.apply_updates(params, updates), state, loss, (grads, moments)

    # Averaged here as the method averages them: how its memory is laid out is its own affair.
    averages = [(jnp.zeros((m, m)), jnp.zeros((n, n))) for m, n in itertools.pairwise(SIZES)]
    weight = 0.0
    for _ in range(num_steps):
        before, measured = int(state[0].num_refreshes), bool(optalr.wants_signals(state))
        batch = rng.choice(len(x), 128, replace=False)
        params, state, loss, (grads, moments) = step(params, state, x[batch], y[batch])
        if measured:
            averages = jax.tree.map(lambda a, m: DECAY * a + (1 - DECAY) * m, averages, moments)
            weight = DECAY * weight + (1 - DECAY)
        if int(state[0].num_refreshes) > before:
            found.append(
                [
                    (rows / weight, grad["w"], cols / weight)
                    for (rows, cols), grad in zip(averages, grads, strict=True)
                ]
            )
    return found, float(loss)


def roots(matrix, basis, tolerance):
    damping = DAMPING * mean_eigenvalue(matrix)
    return inverse_root(
        matrix, damping=damping, method="eigenbasis", basis=basis, tolerance=tolerance
    )


def replay(found, tolerance):
    """Return how many roots were decomposed anew, and the directions of all refreshes."""
    take = jax.jit(roots, static_argnames="tolerance")
    bases, anew, directions = {}, [], []
    for kernels in found:
        parts = []
        for i, (rows, grad, cols) in enumerate(kernels):
            sides = []
            for name, matrix in (("rows", rows), ("cols", cols)):
                basis = bases.get((i, name))
                result = take(matrix, basis, tolerance if basis is not None else None)
                bases[i, name] = result.basis
                sides.append(result.root)
                if basis is not None:
                    anew.append(bool(result.fell_back))
            parts.append(np.ravel(sides[0] @ grad @ sides[1]))
        directions.append(np.concatenate(parts))
    return np.mean(anew), directions


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update-every", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    found, loss = history(arguments.update_every, arguments.steps)
    _, exact = replay(found, 0.0)
    print(
        f"{len(found)} refreshes in {arguments.steps} steps, one every {arguments.update_every} at "
        f"the end; the batch loss is then {loss:.4f}\n"
    )
    print("| tolerance | decomposed anew | relative error, median | largest | smallest cosine |")
    print("|---|---|---|---|---|")
    for tolerance in TOLERANCES:
        anew, directions = replay(found, tolerance)
        pairs = list(zip(directions, exact, strict=True))[1:]
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
        print(
            f"| {tolerance} | {anew:.0%} | {np.median(errors):.3f} | {max(errors):.3f} "
            f"| {min(cosines):.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
