"""The learned decay in chains and wrappers, and what its probes cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import optalr

WIDTH, NUM_EXAMPLES = 64, 256


def predict(params, x, y):
    for i in range(3):
        x = jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"][None])
    return x


def output_loss(outputs, x, y):
    return jnp.mean((outputs - y) ** 2)


def loss_fn(params, x, y):
    return output_loss(predict(params, x, y), x, y)


def make_params(width=WIDTH):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {f"w{i}": jax.random.normal(key, (width, width)) / 4 for i, key in enumerate(keys)}
    return params | {f"b{i}": jnp.full(width, 0.1, jnp.float32) for i in range(3)}


def make_batch(seed, width=WIDTH, num_examples=NUM_EXAMPLES):
    keys = jax.random.split(jax.random.key(seed))
    return tuple(jax.random.normal(key, (num_examples, width)) for key in keys)


DIRECTIONS = {
    "kronecker": lambda: optax.chain(optalr.scale_by_kronecker(damping=0.1), optax.trace(0.9)),
    "adam": optax.scale_by_adam,
    "sgd": lambda: optax.trace(0.9),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_after_any_direction_it_is_decoupled_and_compiled_once(name):
    rate = 1e-2
    learned, last = optalr.add_learned_decay(0.1), optalr.scale_by_recorded_rate(rate)
    tx, plain = (
        optax.chain(DIRECTIONS[name](), learned, last),
        optax.chain(DIRECTIONS[name](), last),
    )
    evaluate = optalr.value_grad_and_extras(optalr.composite_loss(predict, output_loss))
    params, traces = make_params(8), []
    state, without = tx.init(params), plain.init(params)

    @jax.jit
    def step(params, states, batch, held_out):
        traces.append(1)
        _, grads, extras = evaluate(params, *batch)
        both = [
            optax.with_extra_args_support(link).update(
                grads, each, params, **extras, validation_value_fn=held_out
            )
            for link, each in zip((tx, plain), states, strict=True)
        ]
        (updates, state), (bare, without) = both
        return updates, bare, (state, without)

    for seed in range(3):
        x, y = make_batch(seed + 10, 8, 16)
        held_out = Partial(loss_fn, x=x, y=y)
        updates, bare, (state, without) = step(
            params, (state, without), make_batch(seed, 8, 16), held_out
        )
        decay = float(optalr.metrics(state)["weight_decay"])
        for leaf in params:
            shrunk = rate * decay * params[leaf] if leaf.startswith("w") else 0.0
            np.testing.assert_allclose(updates[leaf], bare[leaf] - shrunk, rtol=1e-5, atol=1e-7)
        params = optax.apply_updates(params, updates)
    assert decay != 0.1
    assert len(traces) == 1


def test_masked_and_partitioned_leaves_take_their_own_part_of_the_slope():
    params, (x, y) = make_params(8), make_batch(0, 8, 16)
    held_out = Partial(loss_fn, x=x, y=y)
    grads = jax.grad(held_out)(params)
    only = {name: name == "w1" for name in params}
    expected = -jnp.vdot(grads["w1"], params["w1"])
    labels = jax.tree.map(lambda chosen: "decayed" if chosen else "rest", only)
    make = lambda: optalr.add_learned_decay(0.1, smoothing=0.0)  # noqa: E731
    parted = optax.partition({"decayed": make(), "rest": optax.identity()}, labels)
    for tx in (
        optax.masked(make(), only),
        parted,
        optalr.add_learned_decay(0.1, smoothing=0.0, mask=only),
    ):
        _, state = tx.update(
            grads, tx.init(params), params, validation_value_fn=held_out, point=params
        )
        found = [m for m in jax.tree.leaves(state) if m.shape == () and jnp.allclose(m, expected)]
        assert len(found) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_learn_in_float32(dtype):
    params, (x, y) = make_params(8), make_batch(0, 8, 16)
    half = jax.tree.map(lambda p: p.astype(dtype), params)
    tx = optalr.add_learned_decay(0.1, smoothing=0.0)
    states = [
        tx.update(p, tx.init(p), p, validation_value_fn=Partial(loss_fn, x=x, y=y))
        for p in (half, params)
    ]
    (updates, state), (_, exact) = states
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(state.memory.slope, exact.memory.slope, rtol=0.05)
    assert state.weight_decay.dtype == jnp.float32


def flops(function, *args):
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def training_step(tx):
    def step(params, state, batch, held_out):
        grads = jax.grad(loss_fn)(params, *batch)
        updates, state = tx.update(
            grads, state, params, validation_value_fn=Partial(loss_fn, x=held_out[0], y=held_out[1])
        )
        return optax.apply_updates(params, updates), state

    params, batch = make_params(), make_batch(0)
    return step, (params, tx.init(params), batch, make_batch(1))


def cost_of(*links):
    step, args = training_step(optax.chain(*links, optalr.scale_by_recorded_rate(0.1)))
    return flops(step, *args)


@pytest.mark.parametrize(
    ("options", "passes"), [({}, 2.0), ({"derivative": "backward"}, 3.0), ({"per_leaf": True}, 3.0)]
)
def test_a_probe_costs_less_than_two_forward_passes_or_a_gradient(options, passes):
    forward = flops(loss_fn, make_params(), *make_batch(0))
    added = cost_of(optalr.add_learned_decay(0.1, **options)) - cost_of()
    assert 1.0 * forward < added < passes * forward


def products(jaxpr, *, in_branches):
    """Return how many matrix products a jaxpr has, with or without those in branches."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        if eqn.primitive.name == "cond" and not in_branches:
            continue
        for inner in jax.tree.leaves(
            eqn.params, is_leaf=lambda v: isinstance(v, jax.extend.core.ClosedJaxpr)
        ):
            if isinstance(inner, jax.extend.core.ClosedJaxpr):
                count += products(inner.jaxpr, in_branches=in_branches)
    return count


def test_steps_without_a_probe_compute_nothing_of_it():
    def jaxpr_of(*links):
        step, args = training_step(optax.chain(*links, optalr.scale_by_recorded_rate(0.1)))
        return jax.make_jaxpr(step)(*args).jaxpr

    rare, plain = jaxpr_of(optalr.add_learned_decay(0.1, every=10)), jaxpr_of()
    assert products(rare, in_branches=False) == products(plain, in_branches=False)
    assert products(rare, in_branches=True) > products(plain, in_branches=True)
