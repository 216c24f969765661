"""Steps in which one batch is broken: its inputs, its loss or its gradient."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optalr
from tests.contract import problem

WARM = 12  # steps before a late fault: past every switch of the registry
AFTER = 8  # steps after a fault
ZEROS = 10  # steps of a run of zeros
NOW_AND_THEN = 41  # steps with a fault in every fifth


class Fault(NamedTuple):
    """What is wrong with a batch.

    Attributes:
      inputs: stands in place of one input.
      loss: multiplies the loss, and so all that it reveals.
      gradient: multiplies the gradient between the loss and the method.
      steps: over how many batches.
      every: how many batches of these come to one that is broken.
      counts: whether the method must count it.
    """

    inputs: float | None = None
    loss: float = 1.0
    gradient: float = 1.0
    steps: int = 1
    every: int = 1
    counts: bool = True


FAULTS = {
    "nan": Fault(inputs=np.nan),
    "inf": Fault(inputs=np.inf),
    "loss_1e30": Fault(loss=1e30),
    "loss_1e4": Fault(loss=1e4),
    "gradient_1e30": Fault(gradient=1e30),
    "gradient_1e12": Fault(gradient=1e12),
    "ten_losses_1e4": Fault(loss=1e4, steps=10),
    "zeros": Fault(loss=0.0, steps=ZEROS, counts=False),
}


class Record(NamedTuple):
    """A run: its last parameters, the updates' norms, and the count of failures after each step."""

    params: dict
    norms: np.ndarray
    failures: list


def _predict(params, inputs, labels, scale):
    del scale
    return problem.predict(params, inputs, labels)


def _output_loss(logits, inputs, labels, scale):
    return scale * problem.output_loss(logits, inputs, labels)


@functools.cache
def compiled(method):
    """Return a transformation and its compiled step on a loss of any scale."""
    tx = method.make()
    evaluate = optalr.value_grad_and_extras(optalr.composite_loss(_predict, _output_loss))

    def step(params, state, batch, scales):
        loss_scale, gradient_scale = scales
        wanted = optalr.wants_signals(state)
        _, grads, extras = evaluate(params, *batch, loss_scale, signals=wanted)
        grads = jax.tree.map(lambda g: gradient_scale * g, grads)
        extras["validation_value"] = jnp.float32(1.0)
        extras["validation_value_fn"] = extras["value_fn"]
        updates, state = tx.update(grads, state, params, **extras)
        failures = optalr.metrics(state).get("failures", jnp.int32(0))
        report = updates, optax.tree.norm(updates), failures
        return optax.apply_updates(params, updates), state, report

    return tx, jax.jit(step)


def run(method, num_steps, fault=None, at=0):
    """Train on batches of one distribution, with a fault from step ``at`` on."""
    tx, step = compiled(method)
    params = problem.make_params()
    state, norms, failures = tx.init(params), [], []
    for t in range(num_steps):
        inputs, labels = problem.make_batch(seed=t)
        broken = fault is not None and at <= t < at + fault.steps and (t - at) % fault.every == 0
        if broken and fault.inputs is not None:
            inputs = inputs.at[0, 0].set(fault.inputs)
        scales = (fault.loss, fault.gradient) if broken else (1.0, 1.0)
        params, state, (_, norm, count) = step(params, state, (inputs, labels), np.float32(scales))
        norms.append(float(norm))
        failures.append(int(count))
    return Record(params, np.array(norms), failures)


def recovery(method, share=0.5):
    """Return, by fault, the updates until one has this share of its usual length."""
    expected = run(method, WARM + ZEROS + AFTER)
    usual = np.median(expected.norms[expected.norms > 0])
    found = {}
    for name, fault in FAULTS.items():
        updates = []
        for at in (1, WARM):
            end = at + fault.steps
            norms = run(method, end + AFTER, fault, at).norms[end:]
            normal = norms >= share * np.minimum(expected.norms[end : end + AFTER], usual)
            updates.append(int(np.argmax(normal)) + 1 if normal.any() else None)
        found[name] = "never" if None in updates else max(updates)
    return found


def main():
    """Print a table for the page on faults: ``python -m tests.contract.faults``."""
    from tests.contract.registry import METHODS

    print("| method |", *(f"{name} |" for name in FAULTS))
    print("|---" * (1 + len(FAULTS)) + "|")
    for method in METHODS:
        if method.guards:
            print(f"| `{method.name}` |", *(f"{n} |" for n in recovery(method).values()))


if __name__ == "__main__":
    main()
