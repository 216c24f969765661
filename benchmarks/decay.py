"""The decay that gives the flow its name, from small integration steps.

    python benchmarks/decay.py [docs/images/flow_decay.png]

It draws the norm of ``F``, the loss's derivative in the outputs, along undamped flows of type G
with exact solves, over the profiles that they were asked to follow, ``F(t) = e^{-t} F(0)`` among
them.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optalr


def decay(profile, time_step, end):
    """Follow a flow by small undamped steps; return times and F, the derivative in the outputs."""
    rotation = np.array([[0.6, 0.8], [-0.8, 0.6]], np.float32)
    loss = optalr.composite_loss(
        lambda w: w + 0.5 * jnp.sin(rotation @ w) - np.array([0.3, -0.5], np.float32),
        lambda z: 0.5 * jnp.sum(z**2),
    )
    tx = optalr.edf(optalr.flow_schedule(profile, time_step), num_steps=2, damping=(0.0, 1.0))

    @jax.jit
    def step(w, state):
        _, grads, extras = optalr.value_grad_and_extras(loss)(w)
        updates, state = tx.update(grads, state, w, **extras)
        return optax.apply_updates(w, updates), state, extras["outputs"]

    w = jnp.array([2.0, 1.0])
    state, derivatives = tx.init(w), []
    times = np.arange(0.0, end, time_step)
    for _ in times:
        w, state, outputs = step(w, state)
        derivatives.append(np.asarray(outputs))
    return times, np.stack(derivatives)


def draw_decay(path):
    """Draw ‖F(t)‖/‖F(0)‖ of three flows over the profiles they were asked to follow."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    profiles = {
        "exp(−t)": (optalr.exponential_profile, 4.0),
        "1 − t": (optalr.linear_profile, 0.96),
        "(1 + t)⁻²": (optalr.power_profile(2.0), 4.0),
    }
    worst = 0.0
    for i, (name, (profile, end)) in enumerate(profiles.items()):
        times, derivatives = decay(profile, 0.02, end)
        norms = np.linalg.norm(derivatives, axis=1)
        expected = np.asarray(profile(jnp.asarray(times)))
        worst = max(worst, float(np.max(np.abs(norms / norms[0] - expected))))
        axes.semilogy(times, expected, color=f"C{i}", linewidth=4, alpha=0.3)
        axes.semilogy(times[::4], norms[::4] / norms[0], ".", color=f"C{i}", label=f"ρ = {name}")
    axes.set_xlabel("time t of the flow")
    axes.set_ylabel("‖F(t)‖ / ‖F(0)‖: flow (dots), ρ(t) (bands)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", nargs="?", default="decay.png", help="where to, a PNG")
    options = parser.parse_args()
    worst = draw_decay(options.picture)
    print(f"drawn to {options.picture}; largest distance from the profile asked for: {worst:.1e}")


if __name__ == "__main__":
    main()
