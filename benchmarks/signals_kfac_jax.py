"""What a step of kfac-jax costs beside a gradient, on the models of ``benchmarks/signals.py``.

    python benchmarks/signals_kfac_jax.py              # in an environment with kfac-jax, not optalr

The released kfac-jax 0.0.8 does not run on jax 0.10, so it gets an environment of its own with the
jax that it runs on, and this file imports nothing of ours; the MLP and the VGG-like net are written
out in bare JAX. Its step is not only a capture: it also updates its factors, its inverses (every
5th step by default) and the parameters. Compare the ratio to *its own* gradient, on the same
machine and jax. On a CPU it differentiates convolutions inside ``cond``, which XLA's CPU backend
runs some 20 times slower than outside.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import kfac_jax


def conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def mlp(params, x):
    for i, (w, b) in enumerate(params):
        x = x @ w + b
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def vgg(params, x):
    for i, (w, b) in enumerate(params[:6]):
        x = jax.nn.relu(conv(x, w) + b)
        if i % 2:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    return mlp(params[6:], x.reshape(x.shape[0], -1))


def problems():
    """Name -> (model, kernel shapes, batch shape)."""
    convolutions = [(3, 3, 3, 32)]
    for width in (32, 64, 64, 128, 128):
        convolutions.append((3, 3, convolutions[-1][-1], width))
    return {
        "mlp": (mlp, [(784, 512), (512, 512), (512, 10)], (128, 784)),
        "vgg": (vgg, [*convolutions, (4 * 4 * 128, 128), (128, 10)], (64, 32, 32, 3)),
    }


def problem(name):
    """Return params, batch, the loss that tells kfac-jax of its likelihood, and the bare loss."""
    model, shapes, batch_shape = problems()[name]
    keys = jax.random.split(jax.random.PRNGKey(0), len(shapes))
    params = [
        (0.05 * jax.random.normal(key, shape), jnp.zeros(shape[-1]))
        for key, shape in zip(keys, shapes, strict=True)
    ]
    x = jax.random.normal(jax.random.PRNGKey(1), batch_shape)
    y = jax.random.randint(jax.random.PRNGKey(2), batch_shape[:1], 0, 10)

    def loss_fn(params, batch):
        x, y = batch
        logits = model(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(logits, jax.nn.one_hot(y, 10))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    def plain_fn(params, batch):
        x, y = batch
        return -jnp.mean(jax.nn.log_softmax(model(params, x))[jnp.arange(len(y)), y])

    return params, (x, y), loss_fn, plain_fn


def measure(name, num_steps):
    params, batch, loss_fn, plain_fn = problem(name)
    gradient = jax.jit(jax.value_and_grad(plain_fn))
    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss_fn),
        l2_reg=0.0,
        use_adaptive_learning_rate=False,
        use_adaptive_momentum=False,
        damping_schedule=lambda step: 1.0,
        num_burnin_steps=0,
        learning_rate_schedule=lambda step: 1e-3,
        momentum_schedule=lambda step: 0.9,
    )
    state = optimizer.init(params, jax.random.PRNGKey(3), batch)
    jax.block_until_ready(gradient(params, batch))
    steps, gradients = [], []
    for i in range(num_steps):
        start = time.perf_counter()
        params, state, _ = optimizer.step(
            params, state, jax.random.PRNGKey(i), batch=batch, global_step_int=i
        )
        jax.block_until_ready(params)
        middle = time.perf_counter()
        jax.block_until_ready(gradient(params, batch))
        steps.append(middle - start)
        gradients.append(time.perf_counter() - middle)
        print(f"{name}, step {i}: {steps[-1]:.3g} s, gradient {gradients[-1]:.3g} s", flush=True)
    steps, gradients = steps[1:], gradients[1:]  # the first step compiles
    return {
        "steps": num_steps,
        "gradient_ms": 1e3 * statistics.median(gradients),
        "step_ms": 1e3 * statistics.median(steps),
        "step": statistics.median(s / g for s, g in zip(steps, gradients, strict=True)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(problems()))
    parser.add_argument("--steps", type=int, default=8)
    results = pathlib.Path(__file__).parent / "results" / "signals_kfac_jax.json"
    parser.add_argument("--out", type=pathlib.Path, default=results)
    args = parser.parse_args()
    measured = {name: measure(name, args.steps) for name in args.models}
    about = {"jax": jax.__version__, "kfac_jax": kfac_jax.__version__}
    text = json.dumps({"about": about, "results": measured}, indent=2)
    print(text)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
