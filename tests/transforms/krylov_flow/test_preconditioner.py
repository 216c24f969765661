"""The flow preconditioned by Kronecker factors of captured signals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr import scale_by_krylov_flow
from tests.transforms.compiling import quick_jit
from tests.transforms.krylov_flow.problems import evaluate_jitted, make_batch, make_params


def test_kronecker_preconditioner_is_exact_where_fisher_is_kronecker():
    # One linear layer, squared loss with inputs and unit output curvature: G = I ⊗ A.
    x = jax.random.normal(jax.random.key(0), (64, 6)) * jnp.array([[100.0, 10, 1, 1, 0.1, 0.01]])
    y = jax.random.normal(jax.random.key(1), (64, 2))
    loss = optalr.composite_loss(
        lambda w, x, y: x @ w["w"], lambda z, x, y: 0.5 * jnp.sum((z - y) ** 2) / 64
    )
    w = {"w": jnp.zeros((6, 2))}
    _, grads, extras = optalr.value_grad_and_extras(loss)(w, x, y)
    moments = extras["signals"]["w"]
    signals = {"w": optalr.LayerMoments(**{**vars(moments), "cols": jnp.eye(2)})}
    kwargs = {"num_steps": 1, "damping": (1e-6, 0.0)}
    plain = scale_by_krylov_flow(**kwargs)
    tx = scale_by_krylov_flow(
        **kwargs, preconditioner=optalr.kronecker_preconditioner(relative_damping=0.0)
    )
    assert bool(optalr.wants_signals(tx.init(w)))
    assert not bool(optalr.wants_signals(plain.init(w)))

    def residual(direction):  # in the 2-norm for both; the states hold each in its own
        left = grads["w"] - extras["gauss_newton"](direction)["w"] - 1e-6 * direction["w"]
        return float(jnp.linalg.norm(left) / jnp.linalg.norm(grads["w"]))

    direction, _ = tx.update(grads, tx.init(w), w, **(extras | {"signals": signals}))
    preconditioned = residual(direction)
    assert preconditioned < 0.05
    direction, state = plain.update(grads, plain.init(w), w, **extras)
    assert residual(direction) > 5 * preconditioned
    np.testing.assert_allclose(residual(direction), state.krylov_residual, rtol=1e-3)


def test_kronecker_preconditioner_needs_and_survives_signals():
    tx = scale_by_krylov_flow(num_steps=3, preconditioner=optalr.kronecker_preconditioner())
    params, (x, y) = make_params(), make_batch()
    _, grads, extras = evaluate_jitted(params, x, y)
    update = quick_jit(tx.update)
    direction, state = update(grads, tx.init(params), params, **extras)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(direction))
    assert int(state.failures) == 0
    # Captured off: the identity, so the plain iterates.
    _, _, off = evaluate_jitted(params, x, y, signals=False)
    plain_tx = scale_by_krylov_flow(num_steps=3)
    plain, _ = quick_jit(plain_tx.update)(grads, state, params, **extras)
    same, _ = update(grads, tx.init(params), params, **off)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), same, plain)
    with pytest.raises(TypeError, match="signals"):
        tx.update(grads, state, params, **{k: v for k, v in extras.items() if k != "signals"})
