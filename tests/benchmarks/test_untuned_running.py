"""What a run hands to its method, on one epoch of digits."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks.untuned_parts.methods import Method
from benchmarks.untuned_parts.problems import load_problem
from benchmarks.untuned_parts.running import Runner

NUM_POINTS = 4


class CountState(NamedTuple):
    new_values: jax.Array
    probes: jax.Array


def count(numbers: Any, total_steps: int) -> optax.GradientTransformation:
    """Return what counts new validation losses, and losses that could be probed."""
    del numbers, total_steps

    def update(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        value, is_new = extras["validation_value"]
        probed = jnp.isfinite(extras["validation_value_fn"](params)) & jnp.isfinite(value)
        new = CountState(state.new_values + is_new, state.probes + probed)
        return jax.tree.map(jnp.zeros_like, updates), new

    zero = jnp.zeros((), jnp.int32)
    return optax.GradientTransformationExtraArgs(lambda _: CountState(zero, zero), update)


@pytest.mark.parametrize("loops", [True, False])
def test_a_validation_loss_is_new_once_however_the_steps_are_run(loops):
    loaded = load_problem("digits_mlp", 0)
    problem = dataclasses.replace(loaded.problem, epochs=1, loops=loops)
    loaded = dataclasses.replace(loaded, problem=problem)
    seen = []

    def shown(state: Any, params: Any) -> Any:
        jax.debug.callback(lambda s: seen.append((int(s.new_values), int(s.probes))), state)
        return params

    method = Method("count", "counts", count, reads_validation=True, shown=shown)
    result = Runner(loaded, method).run(loaded, {}, seed=0, num_points=NUM_POINTS)
    jax.effects_barrier()
    assert [row[0] for row in result["curve"]] == [0, 4, 8, 13, 17]
    assert sorted(set(seen)) == list(zip(range(NUM_POINTS + 1), [0, 4, 8, 13, 17], strict=True))
