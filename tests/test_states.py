import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.states import update_when


def test_a_resting_state_is_returned_as_it_is_and_a_moving_one_updated():
    def update(state, inputs):
        return {"a": state["a"] * inputs["factor"]}

    run = jax.jit(lambda go, state, inputs: update_when(go, update, state, inputs))
    state, inputs = {"a": jnp.arange(3.0)}, {"factor": jnp.float32(2), "unused": jnp.ones(2)}
    np.testing.assert_array_equal(run(True, state, inputs)["a"], [0, 2, 4])
    np.testing.assert_array_equal(run(False, state, inputs)["a"], [0, 1, 2])
    many = jax.vmap(run, in_axes=(0, None, None))(jnp.array([True, False]), state, inputs)
    np.testing.assert_array_equal(many["a"], [[0, 2, 4], [0, 1, 2]])


@pytest.mark.parametrize("read", [False, True])
def test_inputs_that_are_not_read_are_not_computed(read):
    def step(go, state, x):
        inputs = {"cheap": jnp.sin(x), "dear": x @ x @ x}
        return update_when(
            go, lambda s, i: s + i["cheap"] + (i["dear"] if read else 0), state, inputs
        )

    x = jnp.ones((64, 64))
    flops = jax.jit(step).lower(True, x, x).compile().cost_analysis()["flops"]
    assert (flops > 64**3) == read


def test_inputs_that_are_not_arrays_pass():
    double = lambda x: 2 * x  # noqa: E731
    state = update_when(jnp.asarray(True), lambda s, i: i(s), jnp.ones(2), double)
    np.testing.assert_array_equal(state, [2, 2])


def test_phase_one_does_not_copy_the_donated_memory_of_the_first_stage():
    memory = 97  # a size that nothing else in the program has

    def first_update(updates, state, params=None):
        return jax.tree.map(lambda u: u * state[0, 0], updates), state * 0.9

    first = optax.GradientTransformation(lambda params: jnp.eye(memory), first_update)
    tx = optalr.two_stage(first, optax.sgd(0.1), optalr.switch_at(1))
    params = jnp.ones((8, 8))

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params)).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    assert f"f32[{memory},{memory}]" in entry
    assert not re.search(rf"= f32\[{memory},{memory}\]\S* copy\(", entry)
