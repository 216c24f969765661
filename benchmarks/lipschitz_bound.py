"""Is the Lipschitz rate's L a bound on the gradient? ‖∇E‖/L on a digits MLP, step by step.

    python benchmarks/lipschitz_bound.py

It trains by ``optalr.lipschitz_sgd(guards="off")`` on batches of 128, the paper's own rule at every
step, and prints the norm of the whole gradient, and of the last kernel's, over L.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import optalr

BATCH, WIDTHS, STEPS, SEEDS = 128, (64, 128, 64, 10), 4, (0, 1)


def predict(params, x, y):
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ params[-1][0] + params[-1][1]


def cross_entropy(logits, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def start(key):
    keys = jax.random.split(key, len(WIDTHS) - 1)
    init = jax.nn.initializers.lecun_normal()
    shapes = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    return [(init(k, (m, n)), jnp.zeros(n)) for k, m, n in shapes]


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    evaluate = jax.jit(optalr.value_grad_and_extras(optalr.composite_loss(predict, cross_entropy)))
    tx = optalr.lipschitz_sgd("softmax_cross_entropy", num_classes=10, guards="off")
    print("| seed | step | loss | L | ‖∇E‖/L | last kernel's ‖∇E‖/L |")
    print("|---|---|---|---|---|---|")
    for seed in SEEDS:
        order = jax.random.permutation(jax.random.key(seed), len(images))
        params = start(jax.random.key(seed))
        state = tx.init(params)
        for step in range(STEPS):
            batch = order[step * BATCH : (step + 1) * BATCH]
            value, grads, extras = evaluate(params, images[batch], labels[batch])
            updates, state = tx.update(grads, state, params, **extras)
            L = float(optalr.metrics(state)["lipschitz_constant"])
            whole, last = float(optax.tree.norm(grads)), float(jnp.linalg.norm(grads[-1][0]))
            ratios = f"{whole / L:.1f} | {last / L:.1f}"
            print(f"| {seed} | {step + 1} | {float(value):.3g} | {L:.3g} | {ratios} |")
            params = optax.apply_updates(params, updates)


if __name__ == "__main__":
    main()
