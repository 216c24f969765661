"""What a compiled step is made of: few operations, and no control flow where nothing is due."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optalr

SIZES = (784, 512, 512, 10)
OPERATION = re.compile(r"\b(?:stablehlo|chlo)\.(\w+)")


def predict(params, inputs, labels):
    hidden = inputs
    for i in range(3):
        hidden = hidden @ params[f"kernel{i}"] + params[f"bias{i}"][None]
        hidden = jax.nn.relu(hidden) if i < 2 else hidden
    return hidden


def cross_entropy(logits, inputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


LOSS = optalr.composite_loss(predict, cross_entropy)


def shapes():
    params = {}
    for i, (m, n) in enumerate(itertools.pairwise(SIZES)):
        params |= {f"kernel{i}": jnp.zeros((m, n)), f"bias{i}": jnp.zeros(n)}
    batch = jax.ShapeDtypeStruct((128, 784), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32)
    return jax.eval_shape(lambda: params), batch


def operations(tx, kind, platform="cpu"):
    params, batch = shapes()
    lowered = optalr.train_step(LOSS, tx).lower(
        params, jax.eval_shape(tx.init, params), *batch, kind=kind, platforms=(platform,)
    )
    return collections.Counter(OPERATION.findall(lowered.as_text()))


# How many times the operations of Adam's step, which are some 360.
@pytest.mark.parametrize(
    ("kind", "most"), [("plain", 2.2), ("measuring", 3.5), ("refreshing", 4.9), ("second", 1.3)]
)
def test_programs_are_small(kind, most):
    found = operations(optalr.tso_alra(1e-2, switch_at=100), kind)
    adam = operations(optax.adam(1e-3), "plain")
    assert found.total() <= most * adam.total()
    if kind != "refreshing":
        assert not {"while", "case", "if"} & set(found)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_accelerator_iterates_in_one_loop(platform):
    """Its refreshing step holds one iteration for all sizes, and no eigendecomposition beside it.

    An iteration has four loops: over its steps, and over those of three power iterations; a fifth
    is in its step.
    """
    found = operations(optalr.tso_alra(1e-2, switch_at=100), "refreshing", platform)
    adam = operations(optax.adam(1e-3), "plain", platform)
    assert found["while"] == 5
    assert found.total() <= 6 * adam.total()


@pytest.mark.slow
def test_the_traced_step_needs_little_memory():
    """Beyond 32 MiB glibc maps memory anew at every step, which takes as long as the step."""
    tx, (params, batch) = optalr.tso_alra(1e-2, switch_at=100), shapes()
    lowered = optalr.train_step(LOSS, tx).lower(
        params, jax.eval_shape(tx.init, params), *batch, kind="traced"
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 32 * 2**20


@pytest.mark.parametrize("kind", ["plain", "measuring"])
def test_products_are_as_precise_as_those_of_the_loss(kind):
    """TF32 does for an update what it does for a gradient; only roots need more."""
    tx, (params, batch) = optalr.tso_alra(1e-2), shapes()
    lower = functools.partial(
        optalr.train_step(LOSS, tx).lower, params, jax.eval_shape(tx.init, params), *batch
    )
    assert "HIGHEST" not in lower(kind=kind).as_text()
    assert "HIGHEST" in lower(kind="refreshing").as_text()
    with jax.default_matmul_precision("highest"):
        products = re.findall(r"stablehlo.dot_general.*", lower(kind=kind).as_text())
    assert all("HIGHEST" in product for product in products)


def test_a_stage_stands_outside_of_control_flow():
    """On a CPU gradients of convolutions are ten times slower inside."""
    tx = optalr.two_stage(optalr.edf(0.1), optax.sgd(0.1), optalr.switch_at(5))
    params, batch = shapes()
    step, state = optalr.train_step(LOSS, tx), jax.eval_shape(tx.init, params)
    for kind in ("plain", "second"):
        assert "stablehlo.while" not in step.lower(params, state, *batch, kind=kind).as_text()
    assert "stablehlo.while" in step.lower(params, state, *batch, kind="traced").as_text()
