"""What a compiled step takes beside its inputs follows what the method keeps."""

import jax
import jax.numpy as jnp
import pytest

import optalr
from tests.contract import problem
from tests.contract.registry import METHODS

WIDE = (
    6000  # more than ``max_factor_size``: such a side keeps a diagonal, of 6000 and not 36 million
)
# Whole moments refuse so many parameters by name.
DENSE = {"scale_by_block_diagonal", "scale_by_full_matrix", "paper.tso_alra"}


def wide_params():
    params = problem.make_params()
    first = jax.random.normal(jax.random.key(3), (problem.NUM_INPUTS, WIDE)) / 50
    second = jax.random.normal(jax.random.key(4), (WIDE, problem.NUM_CLASSES)) / 50
    params["hidden"] = {"kernel": first, "bias": jnp.zeros(WIDE)}
    params["output"] = {**params["output"], "kernel": second}
    return params


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_temporaries_follow_what_is_kept(method):
    tx, params, batch = method.make(), wide_params(), problem.make_batch()
    if method.name in DENSE:
        with pytest.raises(ValueError, match="max_size"):
            jax.eval_shape(tx.init, params)
        return
    state = jax.eval_shape(tx.init, params)

    def step(params, state, batch):
        wanted = optalr.wants_signals(state)
        _, grads, extras = problem.evaluate(params, batch, signals=wanted)
        return tx.update(grads, state, params, **extras)

    compiled = jax.jit(step).lower(params, state, batch).compile()
    hidden = 4 * problem.NUM_EXAMPLES * WIDE  # the activations of the wide layer
    kept = num_bytes(params) + num_bytes(state) + hidden
    assert compiled.memory_analysis().temp_size_in_bytes <= 8 * kept
    assert f"[{WIDE},{WIDE}]" not in compiled.as_text()
