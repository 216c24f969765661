"""Why undamped flows break down on a full batch: the step against the linear model behind it.

    python benchmarks/flow_breakdown.py

The problem is that of ``configs/edf_fit``: digits as one batch, two convolutions and two dense
layers. For undamped type G with k = 10 it prints the loss that the linearized net would have after
a step, and the loss that it has, at whole and shorter steps; then, step by step, the trace of an
image's block of H_L, which is what G is made of. For damped type G it prints the same steps, and
for damped type H with k = 5 the curvature along the step taken.
"""

import jax
import jax.numpy as jnp
import optax

import optalr
from optalr.experiments.configs.config import DataConfig
from optalr.experiments.data import load
from optalr.experiments.models.convolution import cnn

STEPS = 6


def problem():
    """Return the net as a function of its parameters, its loss, and the first parameters."""
    data = load(DataConfig(name="digits"))
    x, y = data.prepare(jnp.asarray(data.train.x)), jnp.asarray(data.train.y)
    net = cnn(10, widths=(8, 16), dense=32)
    params = net.init(jax.random.key(0), x[:1], train=False)["params"]

    def predict(params):
        return net.apply({"params": params}, x, train=False)

    def cross_entropy(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return predict, cross_entropy, params


def trace_of_output_hessian(logits):
    """Return the mean over images of the trace of ``diag(θ) − θθᵀ``."""
    p = jax.nn.softmax(logits)
    return float(jnp.mean(1 - jnp.sum(p**2, -1)))


def along(predict, cross_entropy, params, step):
    """Print the loss by the linearized net and by the net itself, along a step."""
    logits, moved = jax.jvp(predict, (params,), (step,))
    print("| share of the step | loss if outputs were linear | loss |")
    print("|---|---|---|")
    for share in (0.1, 0.5, 1.0):
        after = jax.tree.map(lambda p, s, share=share: p + share * s, params, step)
        linear = float(cross_entropy(logits + share * moved))
        print(f"| {share} | {linear:.3f} | {float(cross_entropy(predict(after))):.3f} |")


def run(title, tx, *, looks_along):
    """Print what happens in the first steps of a method."""
    predict, cross_entropy, params = problem()
    loss = optalr.composite_loss(predict, cross_entropy)
    evaluate, state = jax.jit(optalr.value_grad_and_extras(loss)), tx.init(params)
    update = jax.jit(tx.update)
    print(f"\n{title}\n")
    rows = []
    for number in range(STEPS):
        value, grads, extras = evaluate(params)
        step, state = update(grads, state, params, **extras)
        if number == 0 and looks_along:
            along(predict, cross_entropy, params, step)
        square = optax.tree.vdot(step, step)
        curvature = optax.tree.vdot(step, extras["hessian"](step)) / square
        report = optalr.metrics(state)
        numbers = (
            number + 1,
            float(value),
            float(jnp.sqrt(square)),
            float(optax.tree.norm(params)),
            trace_of_output_hessian(predict(params)),
            float(report["krylov_residual"]),
            float(curvature),
        )
        rows.append("| " + " | ".join(f"{x:.3g}" for x in numbers) + " |")
        params = optax.apply_updates(params, step)
    print("\n| step | loss | ‖v‖ | ‖w‖ | trace of H_L | residual | vᵀHv/vᵀv |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


def main() -> None:
    undamped = optalr.edf(1.0, num_steps=10, damping=(0.0, 1.0))
    run("Type G, k = 10, undamped:", undamped, looks_along=True)
    run("Type G, k = 10, damped:", optalr.edf(1.0, num_steps=10), looks_along=False)
    damped = optalr.edf(1.0, num_steps=5, curvature="hessian")
    run("Type H, k = 5, damped:", damped, looks_along=False)


if __name__ == "__main__":
    main()
