"""What the Kronecker form refuses, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.transforms.kronecker.transform import (
    KroneckerOptions,
    scale_by_kronecker,
)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"power": 0.5}, "power"),
        ({"power": -2.0}, "power"),
        ({"decay": 1.0}, "decay"),
        ({"damping": -1.0}, "damping"),
        ({"update_every": 0}, "update_every"),
        ({"signals_every": 0}, "signals_every"),
        ({"statistics": "both"}, "statistics"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises((ValueError, TypeError), match=name):
        scale_by_kronecker(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"warmup": -1.0}, "warmup"),
        ({"min_batches": 0}, "min_batches"),
        ({"max_update": 0.0}, "max_update"),
        ({"damping_form": "cubic"}, "damping_form"),
        ({"spectrum": "none"}, "spectrum"),
        ({"spectrum": "exact", "damping_form": "balanced"}, "damping_form"),
        ({"block_size": 1}, "block_size"),
        ({"max_factor_size": 0}, "max_factor_size"),
        ({"root_dtype": "float16"}, "root_dtype"),
    ],
)
def test_bad_options_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        KroneckerOptions(**arguments)


def test_joint_bias_needs_a_layout():
    with pytest.raises(ValueError, match="joint_bias=True needs layout="):
        scale_by_kronecker(options=KroneckerOptions(joint_bias=True))


def test_options_may_be_a_mapping_of_their_fields():
    grads = {"w": jnp.array([[3.0, 1.0], [0.0, 2.0]])}
    fields = {"warmup": 0, "min_batches": 1, "max_update": None, "spectrum": "exact"}
    found, expected = (
        tx.update(grads, tx.init(grads))
        for tx in (
            scale_by_kronecker(statistics="gradient", options=fields),
            scale_by_kronecker(statistics="gradient", options=KroneckerOptions(**fields)),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(TypeError, match="options has no field 'blocks'"):
        scale_by_kronecker(options={"blocks": 16})
    with pytest.raises(TypeError, match="options must be a KroneckerOptions or a mapping"):
        scale_by_kronecker(options="exact")  # type: ignore[arg-type]


def test_missing_signals_name_the_call_that_supplies_them(layer):
    grads, *_ = layer
    tx = scale_by_kronecker()
    with pytest.raises(TypeError, match=r"'signals'.*value_grad_and_extras.*statistics='gradient'"):
        tx.update(grads, tx.init(grads))
