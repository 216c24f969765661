"""The three forms against dense matrices: what one form stores, a masked dense matrix has too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr import linalg
from optalr.linalg.blocks import Blocks
from optalr.linalg.structured import Diagonal, Full, as_structured
from tests.references import random_spd

SIZE, COLUMNS = 7, 3
FORMS = {"full": Full(SIZE), "blocks": Blocks(SIZE, num_blocks=2), "diagonal": Diagonal(SIZE)}


def dense(form, matrix):
    """Return what a form keeps of a matrix, as a dense matrix."""
    if isinstance(form, Full):
        return matrix
    block = 1 if isinstance(form, Diagonal) else form.block
    places = np.arange(SIZE) // block
    return np.where(places[:, None] == places[None, :], matrix, 0)


def power_of(matrix, power):
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return (vectors * values**power) @ vectors.T


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture
def matrix():
    return random_spd(0, SIZE, condition=20.0).astype(np.float32)


@pytest.fixture
def columns():
    return np.random.default_rng(1).standard_normal((SIZE, COLUMNS)).astype(np.float32)


def test_products_are_those_of_the_dense_matrix(form, matrix, columns):
    kept = form.of_gram(jnp.asarray(matrix))
    expected = dense(form, matrix) @ columns
    product = kept @ form.pad(jnp.asarray(columns), -2)
    np.testing.assert_allclose(product[:SIZE], expected, rtol=1e-5, atol=1e-6)
    product = form.pad(jnp.asarray(columns.T), -1) @ kept
    np.testing.assert_allclose(product[:, :SIZE], expected.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(kept.T.T.stored, kept.stored)


def test_a_gram_matrix_is_kept_as_the_whole_one_would_be(form, columns):
    kept = form.gram(jnp.asarray(columns))
    whole = form.of_gram(jnp.asarray(columns @ columns.T))
    if isinstance(form, Blocks):  # which pads with the mean
        np.testing.assert_allclose(kept.stored, whole.stored, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(kept.stored, whole.stored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2, 4, 3.3])
def test_roots_are_those_of_the_dense_matrix(form, matrix, columns, p):
    root = form.of_gram(jnp.asarray(matrix)).root(p, 0.1)
    expected = power_of(dense(form, matrix) + 0.1 * np.eye(SIZE), -1 / p) @ columns
    got = (root @ form.pad(jnp.asarray(columns), -2))[:SIZE]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_mean_eigenvalue_and_the_eigenvalues_leave_padding_out(form, matrix):
    kept = form.of_gram(jnp.asarray(matrix))
    np.testing.assert_allclose(kept.mean(), np.trace(matrix) / SIZE, rtol=1e-5)
    np.testing.assert_allclose(linalg.mean_eigenvalue(kept), kept.mean())
    expected = np.linalg.eigvalsh(dense(form, matrix).astype(np.float64))
    np.testing.assert_allclose(kept.eigenvalues(), expected, rtol=1e-4)


def test_the_identity_changes_nothing(form, columns):
    padded = form.pad(jnp.asarray(columns), -2)
    np.testing.assert_array_equal(form.identity() @ padded, padded)
    assert float(jnp.abs(form.zeros() @ padded).max()) == 0


def test_moving_averages_and_bytes(form, matrix):
    kept = form.zeros().fold(form.of_gram(jnp.asarray(matrix)), 0.75)
    np.testing.assert_allclose(4 * kept.stored, form.of_gram(jnp.asarray(matrix)).stored, rtol=1e-6)
    assert kept.nbytes == 4 * form.count == 4 * kept.stored.size
    assert kept.stored.shape == form.shape


def test_a_stack_equals_its_members(form, columns):
    grams = np.stack([random_spd(i, SIZE, condition=9.0) for i in range(2)]).astype(np.float32)
    stacked = form.of_gram(jnp.asarray(grams))
    assert stacked.stack == (2,)
    assert form.zeros((2,)).stored.shape == stacked.stored.shape == form.identity((2,)).stored.shape
    padded = form.pad(jnp.stack([jnp.asarray(columns)] * 2), -2)
    product = stacked.root(2, jnp.array([0.1, 0.2])) @ padded
    for i, damping in enumerate((0.1, 0.2)):
        one = form.of_gram(jnp.asarray(grams[i])).root(2, damping) @ padded[i]
        np.testing.assert_allclose(product[i], one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stacked.mean()[1], form.of_gram(jnp.asarray(grams[1])).mean())
    scaled = stacked.scaled(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(scaled.stored[1], 2 * stacked.stored[1])


def test_both_sides_may_have_any_form(matrix, columns):
    right = random_spd(2, COLUMNS).astype(np.float32)
    for form in FORMS.values():
        left = form.of_gram(jnp.asarray(matrix))
        padded = form.pad(jnp.asarray(columns), -2)
        got = linalg.apply_kronecker(padded, left, jnp.asarray(right))[:SIZE]
        expected = dense(form, matrix) @ columns @ right
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_moments_are_carried_between_bases_of_any_form(columns):
    def basis(form, seed):
        grams = form.of_gram(jnp.asarray(random_spd(seed, SIZE), jnp.float32))
        if isinstance(form, Diagonal):
            return form.identity()
        return form.holding(linalg.eigenbasis(grams.stored).vectors)

    for form in FORMS.values():
        old, new = basis(form, 3), basis(form, 4)
        moment = form.pad(jnp.abs(jnp.asarray(columns)), -2)
        carried = linalg.carry_second_moments(moment, (old, None), (new, None))
        np.testing.assert_allclose(carried.sum(), moment.sum(), rtol=1e-5)
        there = linalg.carry_first_moments(moment, (old, None), (new, None))
        back = linalg.carry_first_moments(there, (new, None), (old, None))
        np.testing.assert_allclose(back, moment, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="same side"):
        linalg.carry_first_moments(moment, (old, None), (None, None))


def test_forms_are_pytrees_of_their_array(form, matrix):
    kept = form.of_gram(jnp.asarray(matrix))
    assert [leaf.shape for leaf in jax.tree.leaves(kept)] == [form.shape]
    doubled = jax.jit(lambda a: jax.tree.map(lambda x: 2 * x, a))(kept)
    assert type(doubled) is type(form)
    assert (doubled.size, doubled.padded_size) == (form.size, form.padded_size)
    assert as_structured(kept) is kept
