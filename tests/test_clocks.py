"""What an update may do, on the device and on the host."""

import jax.numpy as jnp
import numpy as np
import pytest

from optalr.clocks import ASK, MEASURE, REFRESH, is_barred, is_told, permitted, run_when


def unused(state, inputs):
    raise AssertionError("ran")


@pytest.mark.parametrize("resting", [np.int8(ASK), np.array(ASK, np.int8), jnp.int8(ASK), ASK])
def test_a_state_at_rest_asks_its_clock(resting):
    # Also one that was restored as NumPy arrays: it is not told to do everything.
    assert not is_told(resting)
    may = permitted(resting, MEASURE)
    assert may
    assert not isinstance(may, np.bool_)


def test_a_mark_permits_its_bits_alone():
    assert is_told(np.int8(MEASURE))
    assert permitted(np.int8(MEASURE), MEASURE)
    assert is_barred(permitted(np.int8(MEASURE), REFRESH))
    assert not is_barred(permitted(jnp.int8(MEASURE), REFRESH))


def test_what_is_barred_is_not_even_traced():
    barred = permitted(np.int8(0), MEASURE)
    assert run_when(jnp.bool_(True), unused, 1.0, inputs=None, may=barred) == 1.0


@pytest.mark.parametrize("due", [True, False])
def test_what_is_permitted_is_used_where_it_is_due(due):
    may = permitted(np.int8(MEASURE), MEASURE)
    new = run_when(jnp.bool_(due), lambda s, i: s + i, jnp.ones(2), inputs=jnp.ones(2), may=may)
    np.testing.assert_array_equal(new, np.full(2, 1.0 + due))
