"""Losses, dense matrices and steps that the tests of the flow share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import optalr
from tests.transforms.compiling import quick_jit


def predict(params, x, y):
    hidden = jnp.tanh(x @ params["w1"])
    return hidden @ params["w2"] + params["b"][None]


def softmax_loss(z, x, y):
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(z), axis=-1))


def squared(z):
    return 0.5 * jnp.sum(z**2)


def rosenbrock(w):
    return jnp.stack([10 * (w[1] - w[0] ** 2), 1 - w[0]])


LOSS = optalr.composite_loss(predict, softmax_loss)
EVALUATE = optalr.value_grad_and_extras(LOSS)
evaluate_jitted = quick_jit(EVALUATE, static_argnames="signals")


def make_params(seed=0):
    k1, k2 = jax.random.split(jax.random.key(seed))
    return {
        "b": jnp.zeros(3),
        "w1": jax.random.normal(k1, (4, 5)) / 2,
        "w2": jax.random.normal(k2, (5, 3)),
    }


def make_batch(seed=1, n=12):
    kx, ky = jax.random.split(jax.random.key(seed))
    return jax.random.normal(kx, (n, 4)), jax.nn.softmax(3 * jax.random.normal(ky, (n, 3)))


@functools.lru_cache
def dense(curvature):
    """Return the gradient and the dense matrix in float64, through float64 parameters."""
    params, batch = jax.tree.map(lambda p: np.asarray(p, np.float64), (make_params(), make_batch()))
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(params)
        gradient = jax.grad(lambda w: LOSS(unravel(w), *batch))(flat)
        if curvature == "hessian":
            matrix = quick_jit(jax.hessian(lambda w: LOSS(unravel(w), *batch)))(flat)
        else:
            z = predict(params, *batch)
            J = quick_jit(jax.jacobian(lambda w: predict(unravel(w), *batch).ravel()))(flat)
            H_L = quick_jit(jax.hessian(lambda z: softmax_loss(z.reshape(12, 3), *batch)))(
                z.ravel()
            )
            matrix = J.T @ H_L @ J
        return np.asarray(gradient), np.asarray(matrix)


@functools.cache
def compiled_direction(curvature, num_steps):
    """Return a program ``damping ↦ (direction, state)`` of the flow as the paper has it."""

    def run(damping):
        options = {"curvature": curvature, "num_steps": num_steps, "damping": damping}
        tx = optalr.scale_by_krylov_flow(**options, negative_curvature="keep")
        params = make_params()
        _, grads, extras = EVALUATE(params, *make_batch())
        return tx.update(grads, tx.init(params), params, **extras)

    return quick_jit(run)


def direction_of(tx, params=None, batch=None, **more):
    params = make_params() if params is None else params
    batch = make_batch() if batch is None else batch

    @quick_jit
    def run(params, state):
        _, grads, extras = EVALUATE(params, *batch)
        return tx.update(grads, state, params, **{**extras, **more})

    return run(params, tx.init(params))


def train(tx, steps, seed=0):
    params, batch = make_params(seed), make_batch()

    @quick_jit
    def step(params, state):
        value, grads, extras = EVALUATE(params, *batch, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return values, state
