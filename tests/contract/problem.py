"""The tiny problem that every method of the registry is put through: a net with two layers."""

import functools

import jax
import jax.numpy as jnp

import optalr
from optalr.signals.moments import LayerMoments

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


def _forward(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden, hidden @ params["output"]["kernel"] + params["output"]["bias"][None]


def predict(params, inputs, labels):
    return _forward(params, inputs)[1]


def output_loss(logits, inputs, labels):
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))


def loss(params, inputs, labels):
    return output_loss(predict(params, inputs, labels), inputs, labels)


@functools.cache
def _supplied():
    return optalr.value_grad_and_extras(optalr.composite_loss(predict, output_loss))


def evaluate(params, batch, signals=True):
    """Return value, gradient and every extra of the vocabulary."""
    if hasattr(optalr, "value_grad_and_extras"):
        value, grads, extras = _supplied()(params, *batch, signals=signals)
    else:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        extras = _hand_made(params, batch, value, grads)
    return value, grads, {**extras, "validation_value": value.astype(jnp.float32)}


def _hand_made(params, batch, value, grads):
    inputs, labels = batch
    hidden, logits = _forward(params, inputs)
    back = jax.grad(output_loss)(logits, inputs, labels) * NUM_EXAMPLES
    back_hidden = (back @ params["output"]["kernel"].T) * (1 - hidden**2)
    output = _moments(hidden, back, "['output']['bias']")
    signals = {
        "hidden": {"kernel": _moments(inputs, back_hidden, "['hidden']['bias']"), "bias": None},
        "output": {"kernel": output, "bias": None},
    }
    return {
        "value": value,
        "grad": grads,
        "value_fn": jax.tree_util.Partial(_value_at, batch),
        "point": params,
        "signals": signals,
        "head": output,
        "outputs": logits,
        "hessian": jax.tree_util.Partial(_hessian_at, params, batch),
        "gauss_newton": jax.tree_util.Partial(_gauss_newton_at, params, batch),
    }


def _moments(inputs, cotangents, bias):
    inputs, cotangents = inputs.astype(jnp.float32), cotangents.astype(jnp.float32)
    return LayerMoments(
        rows=inputs.T @ inputs / NUM_EXAMPLES,
        cols=cotangents.T @ cotangents / NUM_EXAMPLES,
        row_mean=jnp.mean(inputs, axis=0),
        col_mean=None,
        count=jnp.float32(NUM_EXAMPLES),
        positions=jnp.float32(1),
        bias=bias,
    )


def _value_at(batch, params):
    return loss(params, *batch)


def _hessian_at(params, batch, direction):
    return jax.jvp(lambda p: jax.grad(loss)(p, *batch), (params,), (direction,))[1]


def _gauss_newton_at(params, batch, direction):
    logits, tangent = jax.jvp(lambda p: predict(p, *batch), (params,), (direction,))
    _, curved = jax.jvp(lambda z: jax.grad(output_loss)(z, *batch), (logits,), (tangent,))
    return jax.vjp(lambda p: predict(p, *batch), params)[1](curved)[0]
