"""Roots that an iteration cannot take: decomposed at once, or by a program of its own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr

STEPS = 40
# Gradients of two examples leave factors of 24 and 20 rows singular, without any damping.
OPTIONS = optalr.KroneckerOptions(
    root_method="coupled_newton", warmup=0, min_batches=1, max_update=None
)


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["kernel"]) - y) ** 2)


def setting():
    keys = iter(jax.random.split(jax.random.key(0), 3))
    params = {"kernel": 0.1 * jax.random.normal(next(keys), (24, 20))}
    batch = jax.random.normal(next(keys), (2, 24)), jax.random.normal(next(keys), (2, 20))
    tx = optax.chain(
        optalr.scale_by_kronecker(damping=0.0, update_every=5, options=OPTIONS), optax.scale(-1e-4)
    )
    return tx, params, batch


def run(step, tx, params, batch):
    state, seen = tx.init(params), []
    for _ in range(STEPS):
        params, state, _ = step(params, state, *batch)
        seen.append(optalr.metrics(state))
    return params, seen


@pytest.fixture(scope="module")
def told():
    tx, params, batch = setting()
    step = optalr.train_step(loss_fn, tx, donate=False, read_every=10)
    return step, *run(step, tx, params, batch)


def traced(tx):
    @jax.jit
    def step(params, state, *batch):
        evaluate = optalr.value_grad_and_extras(loss_fn)
        value, grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    return step


def test_the_traced_step_decomposes_at_once():
    tx, params, batch = setting()
    _, seen = run(traced(tx), tx, params, batch)
    assert seen[-1]["failures"] == 0
    assert seen[-1]["root_residual"] > 0


def test_the_told_step_decomposes_once_it_has_learned_of_it(told):
    step, params, seen = told
    assert "refreshing" in step.kinds
    assert "repairing" in step.kinds
    failures = np.array([each["failures"] for each in seen])
    # Some roots were missed, all were kept back, and after two readings none is missed any more.
    assert failures[0] == 2
    assert failures[-1] == failures[20]
    assert seen[-1]["root_residual"] > 0
    assert jnp.isfinite(params["kernel"]).all()


def test_what_is_missed_changes_nothing(told):
    """The last good root stays; before the first it is the identity."""
    _, _, seen = told
    _, params, batch = setting()
    gradient = jax.grad(loss_fn)(params, *batch)
    plain = 1e-4 * jnp.linalg.norm(gradient["kernel"])
    assert seen[0]["update_norm"] * 1e-4 == pytest.approx(float(plain), rel=1e-4)


def test_a_basis_that_has_moved_is_decomposed_at_once():
    """That is the rule with refreshed bases, so it needs no program of its own."""
    options = optalr.KroneckerOptions(root_method="eigenbasis", warmup=0, min_batches=1)
    tx = optax.chain(
        optalr.scale_by_kronecker(damping=0.05, update_every=2, decay=0.2, options=options),
        optax.scale(-1e-2),
    )
    _, start, _ = setting()
    told = optalr.train_step(loss_fn, tx, donate=False, read_every=4)
    ends = []
    for step in (told, traced(tx)):
        params, state = start, tx.init(start)
        for i in range(12):  # each batch has another scale, so the factors turn
            x, y, scale = (jax.random.normal(jax.random.key(3 * i + j), (16, 24)) for j in range(3))
            params, state, _ = step(params, state, x * jnp.exp(scale[:1]), y[:, :20])
        assert optalr.metrics(state)["failures"] == 0
        ends.append(params["kernel"])
    np.testing.assert_allclose(*ends, rtol=1e-5, atol=1e-6)
    assert "repairing" not in told.kinds


@pytest.mark.parametrize(("platform", "eigh"), [("cuda", "cusolver_syevd"), ("tpu", "Eigh")])
def test_eigh_stands_beside_an_iteration_where_it_is_to_repair_only(platform, eigh):
    params = {"kernel": jax.ShapeDtypeStruct((256, 160), jnp.float32)}
    batch = [jax.ShapeDtypeStruct((64, n), jnp.float32) for n in (256, 160)]
    tx = optalr.tso_alra(1e-2)
    lower = functools.partial(
        optalr.train_step(loss_fn, tx).lower, params, jax.eval_shape(tx.init, params), *batch
    )
    text = {
        kind: lower(kind=kind, platforms=(platform,)).as_text()
        for kind in ("refreshing", "repairing", "traced")
    }
    found = {kind: bool(re.search(eigh, each)) for kind, each in text.items()}
    assert found == {"refreshing": False, "repairing": True, "traced": True}
