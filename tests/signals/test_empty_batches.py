"""A batch without examples is refused by the names of its arrays; an empty array beside is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import optalr

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
WEIGHTS = jnp.ones(2)


def arrays(params, x, y):
    logits = x @ params["w"] + params["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def dictionary(params, batch):
    return arrays(params, batch["x"], batch["y"])


def sequences(params, x, y):
    return jnp.mean(jnp.square((x @ params["w"]).sum((1, 2)) - y))


def weighted(params, x, weights):
    return jnp.mean(weights[None] * (x @ params["w"]) ** 2)


class Tokens(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        return linen.Dense(5)(linen.Embed(5, 4)(tokens))


def tokens(params, ids):
    logits = Tokens().apply(params, ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


TOKEN_PARAMS = Tokens().init(jax.random.key(0), jnp.zeros((1, 3), int))
COMPOSITE = optalr.composite_loss(
    lambda params, x, y: x @ params["w"], lambda out, x, y: jnp.mean((out - y) ** 2)
)
X, Y = np.zeros((0, 3), np.float32), np.zeros(0, int)
EMPTY = {
    "arrays": (arrays, PARAMS, (X, Y), r"x has shape \(0, 3\), y has shape \(0,\)"),
    "dictionary": (dictionary, PARAMS, ({"x": X, "y": Y},), r"batch\['x'\] has shape \(0, 3\)"),
    "tokens": (tokens, TOKEN_PARAMS, (np.zeros((0, 6), int),), r"ids has shape \(0, 6\)"),
    "no positions": (sequences, PARAMS, (np.zeros((4, 0, 3)), np.ones(4)), r"x .*\(4, 0, 3\)\."),
    "beside weights": (weighted, PARAMS, (X, WEIGHTS), r"x has shape \(0, 3\)\."),
    "composite": (COMPOSITE, PARAMS, (X, X[:, :2]), r"args\[0\] has shape \(0, 3\)"),
}
each_kind = pytest.mark.parametrize(("loss", "params", "args", "named"), EMPTY.values(), ids=EMPTY)


def refused(named):
    message = rf"the batch holds no examples or positions: .*{named}.*Skip an empty batch"
    return pytest.raises(ValueError, match=message)


@each_kind
def test_an_empty_batch_is_refused_by_the_names_of_its_arrays(loss, params, args, named):
    evaluate = optalr.value_grad_and_extras(loss)
    for call in (evaluate, jax.jit(lambda *a: evaluate(*a)[0])):
        with refused(named if call is evaluate else ""):
            call(params, *args)
    with refused(named):
        evaluate(params, *args, signals=False)
    with refused(named):
        optalr.coverage(loss, params, *args)


@each_kind
@pytest.mark.parametrize(
    "tx",
    [optalr.tso_alra(0.1), optalr.tso_alra(0.1, statistics="gradient"), optax.adam(0.1)],
    ids=["signals", "gradient", "adam"],
)
def test_a_step_on_an_empty_batch_is_refused_and_the_next_is_taken(loss, params, args, named, tx):
    # A step donates what it is given.
    params = jax.tree.map(jnp.copy, params)
    step, state = optalr.train_step(loss, tx), tx.init(params)
    with refused(named):
        step(params, state, *args)
    full = jax.tree.map(lambda a: np.ones((2, *(n or 1 for n in a.shape[1:])), a.dtype), args)
    _, _, value = step(params, state, *full)
    assert jnp.isfinite(value)


def test_arguments_by_name_and_whole_data_sets_are_refused_too():
    evaluate = optalr.value_grad_and_extras(arrays)
    with refused(r"x has shape \(0, 3\), y has"):
        evaluate(PARAMS, x=X, y=Y)
    with refused(r"x has shape \(0, 3\), y has"):
        optalr.full_batch(arrays, chunk_size=2)(PARAMS, X, Y)


def test_an_empty_array_beside_examples_is_no_empty_batch():
    def loss(params, x, mask):
        kept = x * mask if mask.size else x
        return jnp.mean((kept @ params["w"]) ** 2)

    value, _, _ = optalr.value_grad_and_extras(loss)(PARAMS, jnp.ones((4, 3)), jnp.zeros(0))
    assert float(value) == pytest.approx(9.0)


def test_an_empty_array_beside_data_that_the_loss_holds_is_no_empty_batch():
    x = jnp.ones((4, 3))

    def loss(params, mask):
        return jnp.mean((x @ params["w"]) ** 2) + jnp.sum(mask)

    value, _, _ = optalr.value_grad_and_extras(loss)(PARAMS, jnp.zeros(0))
    assert float(value) == pytest.approx(9.0)
    # With a key a loss may draw its data; here a layer shows that there is none.
    with refused(r"x has shape \(0, 3\)"):
        optalr.value_grad_and_extras(lambda p, x, key: jnp.mean(x @ p["w"]))(
            PARAMS, X, jax.random.key(0)
        )
