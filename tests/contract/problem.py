"""The tiny problem that every method of the registry is put through: a net with two layers."""

import functools

import jax
import jax.numpy as jnp

import optalr

NUM_EXAMPLES, NUM_INPUTS, NUM_HIDDEN, NUM_CLASSES = 8, 3, 4, 3


def make_params(dtype=jnp.float32, seed=0):
    first, second = jax.random.split(jax.random.key(seed))
    kernel1 = jax.random.normal(first, (NUM_INPUTS, NUM_HIDDEN), jnp.float32)
    kernel2 = jax.random.normal(second, (NUM_HIDDEN, NUM_CLASSES), jnp.float32)
    params = {
        "hidden": {"kernel": kernel1, "bias": jnp.full(NUM_HIDDEN, 0.1)},
        "output": {"kernel": kernel2, "bias": jnp.zeros(NUM_CLASSES)},
    }
    return jax.tree.map(lambda x: x.astype(dtype), params)


def make_batch(dtype=jnp.float32, seed=1):
    inputs = jax.random.normal(jax.random.key(seed), (NUM_EXAMPLES, NUM_INPUTS), jnp.float32)
    labels = jnp.argmax(inputs, axis=1)
    return inputs.astype(dtype), labels


def predict(params, inputs, labels):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"][None]


def output_loss(logits, inputs, labels):
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))


@functools.cache
def _supplied():
    return optalr.value_grad_and_extras(optalr.composite_loss(predict, output_loss))


def evaluate(params, batch, signals=True):
    """Return value, gradient and every extra of the vocabulary."""
    value, grads, extras = _supplied()(params, *batch, signals=signals)
    validation = {
        "validation_value": value.astype(jnp.float32),
        "validation_value_fn": extras["value_fn"],
    }
    return value, grads, {**extras, **validation}
