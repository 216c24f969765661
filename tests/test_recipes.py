"""What recipes add to the pieces that they chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr


@pytest.mark.parametrize("second_rate", [None, 0.1])
def test_the_second_stage_may_have_a_momentum_that_starts_from_zero(second_rate):
    tx = optalr.tso_alra(
        0.1,
        switch_at=2,
        second_learning_rate=second_rate,
        second_momentum=0.9,
        statistics="gradient",
    )
    params = {"w": jnp.ones((3, 2))}
    grads = {"w": jnp.full((3, 2), 2.0)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        _, state = update(grads, state, params)
    for total in (1.0, 1.0 + 0.9, 1.0 + 0.9 + 0.81):
        updates, state = update(grads, state, params)
        np.testing.assert_allclose(updates["w"], -0.1 * 2.0 * total * np.ones((3, 2)), rtol=1e-6)


def test_a_second_momentum_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="second_momentum"):
        optalr.tso_alra(0.1, second_momentum=1.0)
