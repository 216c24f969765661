"""What is kept is measured as such: diagonals and blocks equal those of whole Gram matrices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr.linalg import spd
from optalr.linalg.blocks import Blocks
from optalr.linalg.structured import Diagonal, Full
from optalr.signals.moments import FactorStorage, LayerMoments, is_moments
from tests.signals.reference import standard_normal
from tests.transforms.compiling import quick_jit

STORAGES = {
    "diagonals": FactorStorage(max_factor_size=3),
    "blocks": FactorStorage(block_size=3),
    "joint diagonals": FactorStorage(max_factor_size=3, joint_bias=True),
    "joint blocks": FactorStorage(block_size=3, joint_bias=True),
    "some": FactorStorage(max_factor_size=7),
}


def grouped_conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def loss_fn(params, x):
    """Use layers in all ways in which a leaf's sums come about."""
    h = jnp.tanh(grouped_conv(x, params["conv"]))
    h = jnp.tanh(h.reshape(len(x), -1) @ params["wide"] + params["b"][None])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    h = jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(h, params["remat"])
    first, second = params["parts"][:, :4], params["parts"][:, 4:]
    h = jnp.tanh(h @ first) @ params["shared"] + (h @ second) @ params["shared"].T
    before, behind = params["cut"][:3], params["cut"][3:]
    return jnp.mean(jnp.sum((h[:, :3] @ before + h @ behind) ** 2, 1))


SHAPES = {
    "conv": (2, 2, 2, 6),
    "wide": (54, 5),
    "b": (5,),
    "stack": (3, 5, 5),
    "remat": (5, 5),
    "parts": (5, 8),
    "shared": (4, 4),
    "cut": (7, 2),
}


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {
        name: 0.5 * standard_normal(key, *shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    return params, standard_normal(7, 6, 3, 3, 4)


@pytest.fixture(scope="module")
def whole(problem):
    return quick_jit(optalr.value_grad_and_extras(loss_fn))(*problem)[2]


def sides_of(storage, problem):
    report = optalr.coverage(loss_fn, *problem, options=storage)
    kernels = [leaf for leaf in report.leaves if leaf.treatment == "kronecker"]
    assert {leaf.path for leaf in kernels} == {f"['{name}']" for name in SHAPES if name != "b"}
    return {leaf.path: storage.sides(leaf.view, leaf.shape) for leaf in kernels}


def expected_side(form, gram, mean):
    if isinstance(form, Full):
        return gram
    return form.of_gram(gram if form.size == gram.shape[-1] else spd.with_ones(gram, mean)).stored


def assert_kept(got, whole, sides):
    """Compare moments in kept shapes with what the forms keep of whole ones."""
    for name in SHAPES:
        if name == "b":
            continue
        moments, full = got[name], whole[name]
        assert isinstance(moments, LayerMoments)
        np.testing.assert_array_equal(moments.count, full.count)
        np.testing.assert_allclose(moments.positions, full.positions, rtol=1e-6)
        means = full.row_mean, full.col_mean
        for form, side, gram, mean in zip(
            sides[f"['{name}']"],
            (moments.rows, moments.cols),
            (full.rows, full.cols),
            means,
            strict=True,
        ):
            want = expected_side(form, gram, mean)
            if not isinstance(form, Full):
                assert side.is_like(form)
                side = side.stored
            np.testing.assert_allclose(side, want, rtol=1e-5, atol=1e-5 * np.max(np.abs(want)))


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_measure_takes_what_is_kept(problem, whole, storage):
    sides = sides_of(storage, problem)
    assert_kept(
        quick_jit(lambda measure: measure(sides))(whole["measure"]), whole["signals"], sides
    )


@pytest.mark.parametrize("flag", ["static", "traced"])
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_the_backward_pass_sums_what_is_kept(problem, whole, storage, flag):
    evaluate = optalr.value_grad_and_extras(loss_fn, storage=storage)
    compiled = quick_jit(evaluate) if flag == "static" else quick_jit(_with_flag(evaluate))
    args = problem if flag == "static" else (jnp.array(True), *problem)
    extras = compiled(*args)[2]
    sides = sides_of(storage, problem)
    assert_kept(extras["signals"], whole["signals"], sides)
    assert_kept(extras["measure"](sides), whole["signals"], sides)


def _with_flag(evaluate):
    return lambda flag, *args: evaluate(*args, signals=flag)


@pytest.mark.parametrize("flag", [False, jnp.array(False)], ids=["static", "traced"])
@pytest.mark.parametrize("storage", [None, STORAGES["joint blocks"]], ids=["whole", "kept"])
def test_moments_that_are_off_are_zeros_of_the_kept_shapes(problem, storage, flag):
    evaluate = optalr.value_grad_and_extras(loss_fn, storage=storage)
    sides = sides_of(STORAGES["joint blocks"], problem)

    def measured(flag, *args):
        return evaluate(*args, signals=flag)[2]["measure"](sides)

    static = isinstance(flag, bool)
    got = quick_jit(measured, static_argnums=0 if static else ())(flag, *problem)
    on = jax.eval_shape(measured, jnp.array(True), *problem)
    chex.assert_trees_all_equal_shapes(got, on)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(got))


def test_the_head_can_be_measured_in_part(problem, whole):
    head = whole["head"]
    sides = Diagonal(head.rows.shape[-1]), Blocks(head.cols.shape[-1], num_blocks=2)
    got = whole["measure_head"](sides)
    np.testing.assert_allclose(got.rows.stored, jnp.diagonal(head.rows), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.cols.stored[1], head.cols[1:, 1:], rtol=1e-5, atol=1e-7)
    assert jax.tree.structure(whole["measure_head"]()) == jax.tree.structure(head)


def test_samples_are_the_same_in_every_shape(problem):
    options = {"every": 2, "max_positions": 4}
    sides = sides_of(STORAGES["blocks"], problem)
    extras = quick_jit(optalr.value_grad_and_extras(loss_fn, **options))(*problem)[2]
    assert_kept(extras["measure"](sides), extras["signals"], sides)


def test_pieces_of_a_convolution_add_up(monkeypatch, problem, whole):
    monkeypatch.setattr("optalr.signals.tracing.convolutions.PIECE", 64)
    sides = sides_of(STORAGES["diagonals"], problem)
    extras = quick_jit(optalr.value_grad_and_extras(loss_fn))(*problem)[2]
    assert_kept(extras["measure"](sides), whole["signals"], sides)


def test_what_does_not_fit_is_named(problem, whole):
    with pytest.raises(ValueError, match=r"keep names \['b'\], where no layer"):
        whole["measure"]({"['b']": (Full(5), Full(5))})
    with pytest.raises(ValueError, match=r"keep describes \['wide'\] by forms of 56 rows"):
        whole["measure"]({"['wide']": (Diagonal(56), Full(5))})
    evaluate = optalr.value_grad_and_extras(loss_fn, storage=STORAGES["diagonals"])
    kept = quick_jit(evaluate)(*problem)[2]
    with pytest.raises(ValueError, match=r"storage= keeps a Diagonal\(5\)"):
        kept["measure"]({"['remat']": (Blocks(5, num_blocks=2), Full(5))})
    with pytest.raises(ValueError, match="without storage="):
        optalr.kronecker_preconditioner()(kept, 0.0)
    with pytest.raises(TypeError, match="storage must be the method's KroneckerOptions"):
        optalr.value_grad_and_extras(loss_fn, storage="blocks")


def test_only_layers_that_are_summed_whole_are_told_to_pass_storage(problem):
    storage = STORAGES["blocks"]

    def told(**given):
        report = optalr.coverage(loss_fn, *problem, options=storage, **given)
        return {leaf.path for leaf in report.leaves if "storage=" in leaf.reason}

    assert {"['stack']", "['remat']", "['shared']"} <= told()
    assert "['wide']" not in told()
    assert told(storage=storage) == set()


def added_bytes(loss, params, batch, *, options):
    """Return the bytes that XLA adds to a gradient for the moments, results included."""
    report = optalr.coverage(loss, params, batch, options=options)
    sides = {leaf.path: options.sides(leaf.view, leaf.shape) for leaf in report.leaves}
    evaluate = optalr.value_grad_and_extras(loss)

    def measured(params, batch):
        value, grads, extras = evaluate(params, batch)
        moments = jax.tree.leaves(extras["measure"](sides), is_leaf=is_moments)
        return value, grads, [(m.rows, m.cols) for m in moments]

    def taken(function):
        memory = jax.jit(function).lower(params, batch).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    added = taken(measured) - taken(jax.value_and_grad(loss))
    return added, sum(leaf.measuring_bytes for leaf in report.leaves)


def test_the_report_counts_the_bytes_that_measuring_takes():
    def conv(params, x):
        h = jax.lax.conv_general_dilated(
            x, params["c"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.sum(jnp.tanh(h) ** 2, (1, 2, 3)))

    def dense(params, x):
        return jnp.mean(jnp.sum(jnp.tanh(x @ params["w"]) ** 2, 1))

    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    for loss, params, x, options in (
        (conv, {"c": floats(3, 3, 16, 32)}, floats(8, 16, 16, 16), FactorStorage()),
        (dense, {"w": floats(12000, 8)}, floats(512, 12000), FactorStorage()),
        (dense, {"w": floats(8, 12000)}, floats(16, 8), FactorStorage(block_size=64)),
    ):
        added, reported = added_bytes(loss, params, x, options=options)
        assert reported / 2 < added < 2 * reported


def test_a_sample_takes_less_memory_in_the_report(problem):
    full = optalr.coverage(loss_fn, *problem)["['conv']"].measuring_bytes
    sampled = optalr.coverage(loss_fn, *problem, every=2, max_positions=3)["['conv']"]
    sums = 4 * (8 * 8 + 6 * 6 + 8 + 1)
    # Two groups of patches of 2·2·2 entries, and 6 channels, at 9 positions of 6 examples.
    assert full == sums + 4 * 6 * 9 * (2 * 8 + 6)
    assert sampled.measuring_bytes == sums + 4 * 3 * 3 * (2 * 8 + 6)
    with pytest.raises(ValueError, match="every"):
        optalr.coverage(loss_fn, *problem, every=0)
