"""A state of other options is refused: at loading, or where the first update is traced."""

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest

import optalr

PARAMS = {"a": {"w": jnp.ones((5, 3)), "b": jnp.zeros(3)}, "c": jnp.ones((3, 2))}
SPECTRA = {
    "factored": {},
    "warm": {"root_method": "eigenbasis"},
    "exact": {"spectrum": "exact"},
    "measured": {"spectrum": "measured"},
}
# The part of a memory by which two spectra differ, as flax and as upgrade_state name it.
APART = {
    frozenset({"factored", "warm"}): "basis",
    frozenset({"exact", "measured"}): "eigen_moment",
}
PAIRS = [(saved, target) for saved in SPECTRA for target in SPECTRA if saved != target]


def make(options):
    return optax.chain(optax.clip(1.0), optalr.scale_by_kronecker(options=options))


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]["w"] + params["a"]["b"][None]) @ params["c"]) ** 2)


def trace_update(tx, state):
    _, grads, extras = optalr.value_grad_and_extras(loss_fn)(PARAMS, jnp.ones((4, 5)))
    jax.eval_shape(lambda s: tx.update(grads, s, PARAMS, **extras), state)


@pytest.mark.parametrize(("saved", "target"), PAIRS)
def test_another_spectrum_is_refused_at_loading_by_name(saved, target):
    state, like = (make(SPECTRA[name]).init(PARAMS) for name in (saved, target))
    part = APART.get(frozenset({saved, target}), "eigenvalues|basis|eigen_moment")
    with pytest.raises(ValueError, match=rf"path \./1/memory/(rows/)?({part})"):
        flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))
    for stored in (state, flax.serialization.to_state_dict(state)):
        with pytest.raises(ValueError, match=rf"saved has .*({part}).*'w'"):
            optalr.upgrade_state(stored, like)


@pytest.mark.parametrize("name", SPECTRA)
def test_a_state_of_the_same_options_loads(name):
    tx = make(SPECTRA[name])
    state = tx.init(PARAMS)
    loaded = flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    trace_update(tx, loaded)


@pytest.mark.parametrize("other", [{"block_size": 2}, {"max_factor_size": 4}])
@pytest.mark.parametrize("spectrum", ["factored", "measured"])
@pytest.mark.parametrize("back", [False, True])
def test_other_sizes_are_refused_where_the_first_update_is_traced(other, spectrum, back):
    saved, target = make({"spectrum": spectrum}), make({"spectrum": spectrum, **other})
    if back:
        saved, target = target, saved
    data = flax.serialization.to_bytes(saved.init(PARAMS))
    loaded = flax.serialization.from_bytes(target.init(PARAMS), data)  # flax sees no shapes
    shapes = sorted([r"\(5, 5\)", r"\(3, 2, 2\)" if "block_size" in other else r"\(5,\)"])
    message = (
        rf"state\.memory\.rows\.factor\['a'\]\['w'\] has .*({'|'.join(shapes)}).*upgrade_state"
    )
    with pytest.raises(ValueError, match=message):
        trace_update(target, loaded)


def test_a_leaf_that_a_layout_treats_otherwise_is_named():
    layout = optalr.coverage(loss_fn, PARAMS, jnp.ones((4, 5)))
    saved, target = optalr.scale_by_kronecker(layout=layout), optalr.scale_by_kronecker()
    data = flax.serialization.to_bytes(saved.init(PARAMS))
    loaded = flax.serialization.from_bytes(target.init(PARAMS), data)
    with pytest.raises(ValueError, match=r"second_moment\['a'\]\['b'\] has no array"):
        trace_update(target, loaded)


OTHERS = {
    "window": (
        optalr.scale_by_full_matrix(window=3),
        optalr.scale_by_full_matrix(window=4),
        r"state\.gram has the shape \(3, 3\).*\(4, 4\)",
    ),
    "inner": (
        optalr.two_stage(optalr.scale_by_full_matrix(window=3), optax.sgd(1.0), 0.0),
        optalr.two_stage(optalr.scale_by_full_matrix(window=4), optax.sgd(1.0), 0.0),
        r"state\.gram has the shape \(3, 3\).*\(4, 4\)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_name_what_does_not_fit(name):
    saved, target, message = OTHERS[name]
    with pytest.raises(ValueError, match=message):
        trace_update(target, saved.init(PARAMS))


@pytest.mark.parametrize(
    ("tx", "place"),
    [
        (optalr.scale_by_block_diagonal(), "moments"),
        (optalr.scale_by_full_matrix(), "moment"),
        (optalr.scale_by_local_gains(), "gains"),
        (optalr.accelerate_by_nesterov_flow(), "velocity"),
        (optalr.swats(), "moment"),
        (optalr.scale_by_learned_rate(0.1, order=1, derivatives="successive_gradients"), "direct"),
        (optalr.scale_by_kronecker(), "memory"),
    ],
)
def test_a_state_of_other_parameters_is_refused(tx, place):
    state = tx.init({**PARAMS, "c": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match=rf"state\.{place}.*shape.*tx\.init\(params\)"):
        trace_update(tx, state)
