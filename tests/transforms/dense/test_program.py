"""What the program of an update looks like: its branches, its precision."""

import re

import jax
import jax.numpy as jnp
import pytest

from tests.transforms.branches import assert_roots_stay_in_branches
from tests.transforms.dense.problems import ALL, BOTH


@BOTH
@pytest.mark.parametrize("lanes", [None, 3])
def test_roots_are_taken_in_a_branch_only(method, lanes):
    """In a loop of no turn or one, that is, which stays one when several states are vmapped."""
    tx = method()
    args = jnp.ones((2, 3)), tx.init(jnp.ones((2, 3)))
    assert_roots_stay_in_branches(tx.update, args, lanes)


@ALL
def test_products_are_taken_in_full_precision(tx):
    g = jnp.ones(3)
    printed = str(jax.make_jaxpr(tx.update)(g, tx.init(g)))
    products = re.findall(r"dot_general\[(.*?)\n\s*\]", printed, re.DOTALL)
    assert products
    assert all("Precision.HIGHEST" in product for product in products)
