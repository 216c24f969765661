"""The options of the Kronecker form: damping, eigenbases, grafting, blocks; its cost."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.transforms.kronecker import transform as kronecker
from optalr.transforms.kronecker.transform import KroneckerOptions, scale_by_kronecker
from tests.transforms import kronecker_layers
from tests.transforms.branches import assert_roots_stay_in_branches
from tests.transforms.kronecker_layers import BARE, gram, power_of, run

N = 16


def moments(rows, cols, count=N):
    return kronecker_layers.moments(rows, cols, count)


def vec(matrix):
    return np.asarray(matrix, np.float64).T.reshape(-1)


@pytest.fixture
def leaf():
    rng = np.random.default_rng(1)
    g = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    return g, gram(rng, 5), gram(rng, 3, 1e-2)


def test_absolute_damping_is_the_papers(leaf):
    g, rows, cols = leaf
    options = dataclasses.replace(BARE, damping_form="absolute")
    updates, _ = run(scale_by_kronecker(damping=1e-2, options=options), g, moments(rows, cols))
    a, b = rows + 1e-2 * np.eye(5), cols + 1e-2 * np.eye(3)
    np.testing.assert_allclose(
        updates, power_of(a, -0.5) @ np.asarray(g) @ power_of(b, -0.5), rtol=1e-4
    )


def test_balanced_damping_is_shared_by_the_mean_eigenvalues(leaf):
    g, rows, cols = leaf
    options = dataclasses.replace(BARE, damping_form="balanced")
    updates, _ = run(scale_by_kronecker(damping=1e-4, options=options), g, moments(rows, cols))
    pi = np.sqrt((np.trace(rows) / 5) / (np.trace(cols) / 3))
    a, b = rows + 1e-2 * pi * np.eye(5), cols + 1e-2 / pi * np.eye(3)
    np.testing.assert_allclose(
        updates, power_of(a, -0.5) @ np.asarray(g) @ power_of(b, -0.5), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("power", "method", "statistics"),
    [
        (-0.3, "cholesky_polar", "signals"),
        (-1 / 3, "cholesky_polar", "signals"),
        (-0.3, "coupled_newton", "signals"),
        (-0.3, "cholesky_polar", "gradient"),
    ],
)
def test_a_power_that_the_root_method_cannot_do_is_refused(power, method, statistics):
    options = KroneckerOptions(root_method=method)
    with pytest.raises(ValueError, match=rf"power=-0.3.*root_method='{method}'.*'auto'"):
        scale_by_kronecker(power, statistics=statistics, options=options)


@pytest.mark.parametrize("power", [-1.0, -0.5, -0.25, 0.0])
@pytest.mark.parametrize("statistics", ["signals", "gradient"])
def test_powers_that_every_root_method_can_do(leaf, power, statistics):
    g, rows, cols = leaf
    for method in ("cholesky_polar", "coupled_newton"):
        options = dataclasses.replace(BARE, root_method=method)
        tx = scale_by_kronecker(power, statistics=statistics, options=options)
        updates, state = jax.eval_shape(lambda *args, tx=tx: run(tx, *args), g, moments(rows, cols))
        assert (updates.shape, updates.dtype) == (g.shape, g.dtype)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(g))


def test_a_traced_power_needs_a_root_method_that_takes_one():
    options = KroneckerOptions(root_method="cholesky_polar")
    with pytest.raises(ValueError, match="power must be a known number"):
        jax.eval_shape(lambda p: scale_by_kronecker(p, options=options).init(jnp.ones(2)), -0.5)
    exact = dataclasses.replace(options, spectrum="exact")  # which takes no roots
    scale_by_kronecker(-0.3, options=exact)


def test_a_graft_by_name_is_refused():
    with pytest.raises(TypeError, match="graft must be an optax"):
        KroneckerOptions(graft="adam")


@pytest.mark.parametrize("form", ["absolute", "relative"])
@pytest.mark.parametrize("power", [-0.5, -1.0])
def test_exact_damping_is_that_of_the_dense_matrix(leaf, form, power):
    g, rows, cols = leaf
    options = dataclasses.replace(BARE, spectrum="exact", damping_form=form)
    tx = scale_by_kronecker(power, damping=1e-3, options=options)
    updates, _ = run(tx, g, moments(rows, cols))
    dense = np.kron(cols, rows)
    added = 1e-3 * (np.trace(dense) / 15 if form == "relative" else 1)
    expected = power_of(dense + added * np.eye(15), power) @ vec(g)
    np.testing.assert_allclose(vec(updates), expected, rtol=2e-4, atol=1e-3)


def test_lemma_1_the_fisher_norm_of_the_update_is_the_gradients(leaf):
    g, rows, cols = leaf
    options = dataclasses.replace(BARE, spectrum="exact", damping_form="absolute")
    updates, _ = run(scale_by_kronecker(damping=1e-3, options=options), g, moments(rows, cols))
    fisher = np.kron(cols, rows) + 1e-3 * np.eye(15)
    np.testing.assert_allclose(vec(updates) @ fisher @ vec(updates), vec(g) @ vec(g), rtol=1e-4)


def test_measured_spectrum_is_a_moving_average_in_the_eigenbasis(leaf):
    g, rows, cols = leaf
    options = dataclasses.replace(BARE, spectrum="measured", damping_form="absolute")
    tx = scale_by_kronecker(decay=0.9, damping=1e-3, options=options)
    signals = moments(rows, cols)
    _, state = run(tx, g, signals)
    other = jnp.flip(g, 0)
    updates, state = run(tx, other, signals, state)
    (a, qa), (b, qb) = (np.linalg.eigh(np.float64(x)) for x in (rows, cols))
    turned = qa.T @ np.asarray(other, np.float64) @ qb
    v = 0.9 * np.outer(a, b) + 0.1 * N * turned**2
    expected = qa @ (turned / np.sqrt(v + 1e-3)) @ qb.T
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-3)


def test_measured_moments_survive_a_change_of_basis():
    rng = np.random.default_rng(2)
    g = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)
    rows, cols = np.diag([4.0, 3.0, 2.0, 1.0]), np.diag([3.0, 2.0, 1.0])
    options = dataclasses.replace(BARE, spectrum="measured")
    tx = scale_by_kronecker(decay=0.5, options=options)
    _, state = run(tx, g, moments(rows, cols))
    sum_before = float(_moments_of(state).sum())
    # The order of the eigenvalues turns round; each direction must keep its own moment.
    flipped = 0 * g, moments(10 * rows[::-1, ::-1], 10 * cols[::-1, ::-1], count=N)
    _, after = run(tx, flipped[0], flipped[1], state)
    np.testing.assert_allclose(_moments_of(after).sum(), 0.5 * sum_before, rtol=1e-4)
    old = _diagonal_of(state)
    np.testing.assert_allclose(_diagonal_of(after), 0.5 * old, rtol=1e-4, atol=1e-5)


def _diagonal_of(state):
    """The second moments of the gradient's own entries that a state stands for."""
    rows, cols = (jnp.square(side.root) for side in state.memory.sides)
    return rows @ _moments_of(state) @ cols.T


def _moments_of(state):
    rows, cols = (side.eigenvalues.max() for side in state.memory.sides)
    return state.memory.eigen_moment * rows * cols


@pytest.mark.parametrize("spectrum", ["exact", "measured"])
@pytest.mark.parametrize("size", [1e-20, 1e19])
def test_eigenvalues_whose_products_leave_float32(leaf, spectrum, size):
    """Factors of one size, of which a gradient has about that size too."""
    g, rows, cols = leaf
    options = dataclasses.replace(BARE, spectrum=spectrum)
    tx = scale_by_kronecker(decay=0.9, damping=1e-2, options=options)
    wanted_state = state = None
    for grad in (g, jnp.flip(g, 0)):  # the second is measured in the first's basis
        wanted, wanted_state = run(tx, grad, moments(rows, cols), wanted_state)
        updates, state = run(tx, size * grad, moments(size * rows, size * cols), state)
    assert int(state.failures) == 0
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(updates, wanted, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("spectrum", ["exact", "measured"])
def test_an_absolute_damping_far_above_all_eigenvalues_is_all_that_counts(leaf, spectrum):
    g, rows, cols = leaf
    options = dataclasses.replace(BARE, spectrum=spectrum, damping_form="absolute")
    tx = scale_by_kronecker(damping=1e-4, options=options)
    updates, _ = run(tx, g, moments(1e-20 * rows, 1e-20 * cols))
    np.testing.assert_allclose(updates, 100 * g, rtol=1e-4)


@pytest.mark.parametrize(
    ("graft", "norm_of"),
    [
        (optax.identity(), lambda g: jnp.linalg.norm(g)),
        (optax.scale_by_adam(), lambda g: jnp.sqrt(g.size)),
    ],
)
def test_grafting_takes_the_other_methods_norm(leaf, graft, norm_of):
    g, rows, cols = leaf
    tx = scale_by_kronecker(options=dataclasses.replace(BARE, graft=graft))
    plain, _ = run(scale_by_kronecker(options=BARE), g, moments(rows, cols))
    updates, _ = run(tx, g, moments(rows, cols))
    np.testing.assert_allclose(jnp.linalg.norm(updates), norm_of(g), rtol=1e-4)
    np.testing.assert_allclose(
        updates / jnp.linalg.norm(updates), plain / jnp.linalg.norm(plain), rtol=1e-4, atol=1e-6
    )


def test_the_grafted_norm_is_taken_leaf_by_leaf(leaf):
    g, rows, cols = leaf
    grads = {"w": g, "b": jnp.array([3.0, 4.0])}
    graft = optax.scale_by_rms()
    tx = scale_by_kronecker(options=dataclasses.replace(BARE, graft=graft))
    updates, _ = run(tx, grads, {"w": moments(rows, cols), "b": None})
    expected, _ = graft.update(grads, graft.init(grads))
    for name in grads:
        wanted = jnp.linalg.norm(expected[name])
        np.testing.assert_allclose(jnp.linalg.norm(updates[name]), wanted, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e20])
def test_grafted_norms_are_right_far_from_one(leaf, size):
    g, rows, cols = leaf
    tx = scale_by_kronecker(options=dataclasses.replace(BARE, graft=optax.identity()))
    updates, state = run(tx, size * g, moments(rows, cols))
    expected, _ = run(tx, g, moments(rows, cols))
    assert int(state.failures) == 0
    np.testing.assert_allclose(updates / size, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graft", [optax.scale_by_adam(), optax.scale_by_rms(0.999)])
def test_the_grafted_methods_memory_is_float32_and_decays(leaf, graft):
    g, rows, cols = leaf
    tx = scale_by_kronecker(options=dataclasses.replace(BARE, graft=graft))
    _, state = run(tx, g.astype(jnp.bfloat16), moments(rows, cols))
    floating = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floating} == {jnp.dtype(jnp.float32)}
    _, after = run(tx, jnp.zeros_like(g, jnp.bfloat16), moments(rows, cols), state)
    np.testing.assert_allclose(after.graft.nu, 0.999 * state.graft.nu, rtol=1e-6)


def test_before_the_first_roots_the_grafted_method_acts(leaf):
    g, rows, cols = leaf
    options = KroneckerOptions(graft=optax.scale_by_adam(), max_update=None)
    updates, _ = run(scale_by_kronecker(options=options), g, moments(rows, cols))
    np.testing.assert_allclose(updates, jnp.sign(g), rtol=1e-4)


@pytest.mark.parametrize("spectrum", ["factored", "exact", "measured"])
@pytest.mark.parametrize("size", [7, 8])
def test_blocks_are_the_diagonal_blocks_of_the_factor(spectrum, size):
    rng = np.random.default_rng(3)
    g = jnp.asarray(rng.standard_normal((size, 3)), jnp.float32)
    rows, cols = gram(rng, size), gram(rng, 3)
    masked = rows.copy()
    masked[:4, 4:] = masked[4:, :4] = 0
    options = dataclasses.replace(BARE, spectrum=spectrum, damping_form="absolute")
    blocked = dataclasses.replace(options, block_size=4)
    updates, state = run(scale_by_kronecker(damping=1e-2, options=blocked), g, moments(rows, cols))
    expected, _ = run(scale_by_kronecker(damping=1e-2, options=options), g, moments(masked, cols))
    assert state.memory.rows.factor.shape == (2, 4, 4)
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spectrum", ["factored", "exact", "measured"])
def test_a_diagonal_side_is_right_in_every_spectrum(spectrum):
    rng = np.random.default_rng(4)
    g = jnp.asarray(rng.standard_normal((7, 3)), jnp.float32)
    rows, cols = gram(rng, 7), gram(rng, 3)
    options = dataclasses.replace(BARE, spectrum=spectrum, damping_form="absolute")
    small = dataclasses.replace(options, max_factor_size=4)
    updates, _ = run(scale_by_kronecker(damping=1e-2, options=small), g, moments(rows, cols))
    diagonal = np.diag(np.diag(rows))
    expected, _ = run(scale_by_kronecker(damping=1e-2, options=options), g, moments(diagonal, cols))
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 2},
        {"spectrum": "exact"},
        {"spectrum": "measured", "block_size": 2},
        {"spectrum": "measured", "max_factor_size": 4},
        {"root_method": "eigenbasis"},
        {"root_method": "coupled_newton"},
    ],
    ids=str,
)
@pytest.mark.parametrize("statistics", ["signals", "gradient"])
def test_products_are_as_precise_as_those_of_the_loss_and_roots_exact(leaf, options, statistics):
    g, rows, cols = leaf
    tx = scale_by_kronecker(statistics=statistics, options=KroneckerOptions(**options))
    grads, signals = {"w": g, "table": g}, {"w": moments(rows, cols), "table": None}

    def exact_products():
        step = jax.jit(lambda g, state, signals: tx.update(g, state, signals=signals))
        text = step.lower(grads, tx.init(grads), signals).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        return ["precision = [HIGHEST, HIGHEST]" in line for line in products]

    by_default = exact_products()
    assert any(by_default)
    # At least one product a side of each leaf, if it is a matrix, is of the gradient.
    assert by_default.count(False) >= 2
    with jax.default_matmul_precision("highest"):
        assert all(exact_products())


@pytest.mark.parametrize("lanes", [None, 3])
def test_roots_are_taken_in_a_branch_only(leaf, lanes):
    """In a loop of no turn or one, that is, which stays one when several states are vmapped."""
    g, rows, cols = leaf
    tx = scale_by_kronecker()

    def update(g, state, signals):
        return tx.update(g, state, signals=signals)

    args = g, tx.init(g), moments(rows, cols)
    assert_roots_stay_in_branches(update, args, lanes)


@pytest.mark.parametrize("root_method", ["auto", "eigenbasis"])
@pytest.mark.parametrize("spectrum", ["factored", "exact", "measured"])
def test_a_step_without_refresh_pays_nothing_for_roots(leaf, monkeypatch, spectrum, root_method):
    """Outside its loops a step adds scalars only to one that has no refresh in it at all."""
    g, rows, cols = leaf
    options = KroneckerOptions(spectrum=spectrum, root_method=root_method)
    tx = scale_by_kronecker(options=options)
    state, signals = tx.init(g), moments(rows, cols)

    def equations():
        # A new function each time, or the trace of the last would be found again.
        jaxpr = jax.make_jaxpr(lambda *args: tx.update(args[0], args[1], signals=args[2]))
        return jaxpr(g, state, signals).eqns

    with_refresh = equations()
    monkeypatch.setattr(kronecker, "refresh", lambda step, memories, state: (memories, state))
    without = equations()

    def arrays(eqns):
        shapes = [(e.primitive.name, tuple(v.aval.shape for v in e.outvars)) for e in eqns]
        return collections.Counter(
            (name, sizes) for name, sizes in shapes if name != "while" and any(sizes)
        )

    assert arrays(with_refresh) == arrays(without)
    assert sum(arrays(without).values()) > 0
    loops = [sum(e.primitive.name == "while" for e in eqns) for eqns in (with_refresh, without)]
    assert loops == [2, 1]  # a refresh and a measurement; a measurement


def test_captured_moments_train_a_small_net_at_the_papers_rate():
    """The whole path: capture, precondition, switch, at rate 1e-2 out of the box."""
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.standard_normal((64, 6)) * [30, 10, 3, 1, 0.3, 0.1], jnp.float32)
    y = jnp.asarray(np.argmax(rng.standard_normal((64, 6)) @ rng.standard_normal((6, 3)), -1))
    params = {
        "a": {"w": jnp.asarray(rng.standard_normal((6, 16)) / 3, jnp.float32), "b": jnp.zeros(16)},
        "c": {"w": jnp.asarray(rng.standard_normal((16, 3)) / 4, jnp.float32), "b": jnp.zeros(3)},
    }

    def loss_fn(p, x, y):
        h = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"][None, :])
        logits = h @ p["c"]["w"] + p["c"]["b"][None, :]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    evaluate = optalr.value_grad_and_extras(loss_fn)
    losses = {}
    for name, tx in (
        ("tso", optalr.tso_alra(1e-2, switch_at=150)),
        ("sgd", optax.sgd(1e-2, 0.9)),
    ):

        def step(carry, _, tx=tx):
            p, state = carry
            wants = optalr.wants_signals(state)
            loss, grads, extras = evaluate(p, x, y, signals=wants)
            updates, state = optax.with_extra_args_support(tx).update(grads, state, p, **extras)
            return (optax.apply_updates(p, updates), state), loss

        scan = jax.jit(lambda c, step=step: jax.lax.scan(step, c, length=200))
        _, trace = scan((params, tx.init(params)))
        losses[name] = trace
    assert bool(jnp.isfinite(losses["tso"]).all())
    assert float(losses["tso"][-1]) < 0.75 * float(losses["sgd"][-1])
