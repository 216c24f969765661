"""What the dense structures refuse, by name and with the way out."""

import jax
import jax.numpy as jnp
import pytest

from optalr import scale_by_block_diagonal, scale_by_full_matrix
from tests.transforms.dense.problems import BOTH


def test_what_would_not_fit_is_refused_with_its_bytes_and_the_way_out():
    params = {"small": jnp.zeros(3), "w": jnp.zeros((100, 30))}
    message = r"\['w'\] with 3,000 numbers would take 72,000,000 bytes.*scale_by_kronecker"
    with pytest.raises(ValueError, match=message):
        scale_by_block_diagonal().init(params)
    message = r"3,003 parameters would take 72,144,072 bytes.*scale_by_kronecker.*window="
    with pytest.raises(ValueError, match=message):
        scale_by_full_matrix(max_size=1000).init(params)
    scale_by_full_matrix(max_size=1000, window=2).init(params)


def test_a_window_that_would_not_fit_is_refused_with_its_bytes_and_the_way_out():
    def init(tx, size):
        return jax.eval_shape(tx.init, jax.ShapeDtypeStruct((size,), jnp.float32))

    message = r"window=10,000 .* 100,000,000 parameters would take 4,000,400,000,000 bytes"
    message += r".*max_size=16,384 accepts 2,147,483,648.*window=.*scale_by_kronecker.*max_size"
    with pytest.raises(ValueError, match=message):
        init(scale_by_full_matrix(window=10_000), 10**8)
    init(scale_by_full_matrix(window=200), 2 * 10**6)
    # r P + r² numbers, as many as the whole matrix of max_size parameters and its root.
    init(scale_by_full_matrix(window=10, max_size=10), 10)
    with pytest.raises(ValueError, match="max_size=10 "):
        init(scale_by_full_matrix(window=10, max_size=10), 11)
    init(scale_by_full_matrix(window=10_000, max_size=10**6), 10**8)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"power": 1.0}, "power"),
        ({"decay": 1.5}, "decay"),
        ({"damping": -1.0}, "damping"),
        ({"damping_form": "both"}, "damping_form"),
        ({"update_every": 0}, "update_every"),
        ({"max_size": 0}, "max_size"),
    ],
)
def test_bad_arguments_are_named(method, arguments, name):
    with pytest.raises(ValueError, match=name):
        method(**arguments)


def test_a_bad_window_is_named():
    with pytest.raises(ValueError, match="window"):
        scale_by_full_matrix(window=0)
