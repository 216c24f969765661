"""The models: their published sizes, their shapes, and what is captured of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr.experiments.configs.config import ModelConfig
from optalr.experiments.data import Dataset, Split
from optalr.experiments.errors import ExperimentError
from optalr.experiments.models import build_model
from optalr.experiments.training.objective import OBJECTIVES
from optalr.experiments.training.steps import make_loss


def _dataset(shape, *, classes=10, task="classification"):
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    y = np.arange(4, dtype=np.int32) % classes
    if task == "language":
        x = np.arange(4 * shape[0], dtype=np.int32).reshape(4, shape[0]) % classes
        y = x
    part = Split(x, y)
    return Dataset("some", part, part, part, task, classes)


def _model(name, shape, *, classes=10, task="classification", **options):
    dataset = _dataset(shape, classes=classes, task=task)
    return build_model(ModelConfig(name=name, **options), dataset)


def _count(model):
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _values(model):
    """Return numbers of the right shapes; compiling an initialization takes many seconds."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.1, 0.3, s.shape), s.dtype), shapes)


SMALL, COLOR = (28, 28, 1), (32, 32, 3)


@pytest.mark.parametrize(
    ("name", "shape", "options", "count"),
    [
        # Sums that can be done by hand.
        ("linear", SMALL, {}, 7850),
        ("mlp", (8, 8, 1), {"hidden": [128, 64]}, 8320 + 8256 + 650),
        # LeNet-5 with a dense second convolution.
        ("lenet", SMALL, {}, 61_706),
        ("lenet", COLOR, {}, 62_006),
        # "The model has 730K parameters", and 256 of batch normalization.
        ("table1_cnn", SMALL, {}, 730_090 + 256),
        # He et al. 2015, table 6: 0.27 M, 0.85 M, 1.7 M; 11.2 M for the 18 layers of table 1.
        ("resnet", COLOR, {"depth": 20}, 269_722),
        ("resnet", COLOR, {"depth": 56}, 853_018),
        ("resnet", COLOR, {"depth": 110}, 1_727_962),
        ("resnet", COLOR, {"depth": 18}, 11_173_962),
        # Simonyan & Zisserman's convolutions (14.7 M without biases) and small dense layers.
        ("vgg", COLOR, {"depth": 16, "dense": 0}, 14_710_464 + 2 * 4224 + 5130),
    ],
)
def test_parameter_counts(name, shape, options, count):
    assert _count(_model(name, shape, **options)) == count


def test_resnet_164_v2_has_the_published_size():
    # He et al. 2016: 1.7 M.
    assert round(_count(_model("resnet", COLOR, depth=164, version=2)) / 1e6, 1) == 1.7


def test_transformer_parameter_count():
    model = _model("transformer", (16,), classes=50, task="language", layers=2, width=32, heads=4)
    block = 2 * 64 + 4 * (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    assert _count(model) == 50 * 32 + 16 * 32 + 2 * block + 64 + (32 * 50 + 50)


SHAPES = [
    ("lenet", SMALL, {}),
    ("table1_cnn", SMALL, {}),
    ("alexnet", SMALL, {"width": 4, "dense": 16}),
    ("alexnet", COLOR, {"width": 4, "dense": 16}),
    ("vgg", SMALL, {"width": 0.05, "dense": 8}),
    ("vgg", COLOR, {"depth": 11, "width": 0.05, "dense": 8}),
    ("resnet", COLOR, {"depth": 8}),
    ("resnet", SMALL, {"depth": 11, "version": 2}),
    ("cnn", (8, 8, 1), {"widths": [4], "dense": 8}),
    ("transformer", (16,), {"width": 8, "heads": 2}),
]


@pytest.mark.parametrize(("name", "shape", "options"), SHAPES)
def test_shapes_of_outputs_and_training_mode(name, shape, options):
    task = "language" if name == "transformer" else "classification"
    model = _model(name, shape, task=task, **options)
    params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((4, *shape), model.example.dtype)
    outputs, kept = jax.eval_shape(model.apply, params, model_state, x)
    assert outputs.shape == (4, *shape, 10) if task == "language" else (4, 10)
    trained, new = jax.eval_shape(model.apply, params, model_state, x, key=jax.random.key(1))
    assert trained.shape == outputs.shape
    assert jax.tree.structure(new) == jax.tree.structure(kept)
    assert model.has_convolutions() == (task == "classification")


def test_every_layer_of_every_model_is_captured():
    for name, shape, options in SHAPES:
        task = "language" if name == "transformer" else "classification"
        dataset = _dataset(shape, task=task)
        model = build_model(ModelConfig(name=name, **options), dataset)
        loss_fn = make_loss(model, OBJECTIVES[task], dataset)
        params, model_state = jax.eval_shape(model.init, jax.random.key(0))
        arguments = (dataset.train.x, dataset.train.y, model_state, jax.random.key(0))
        treatment = optalr.coverage(
            lambda *a, loss_fn=loss_fn: loss_fn(*a)[0], params, *arguments
        ).treatment
        kernels = {path: how for path, how in treatment.items() if "kernel" in path}
        assert set(kernels.values()) == {"kronecker"}, name


def test_dropout_and_batch_statistics_follow_the_mode():
    model = _model("table1_cnn", (12, 12, 1))
    params, model_state = _values(model)
    apply = jax.jit(model.apply)
    x = jax.random.normal(jax.random.key(1), (4, 12, 12, 1))
    tested, same = apply(params, model_state, x)
    jax.tree.map(np.testing.assert_array_equal, same, model_state)
    one, moved = apply(params, model_state, x, key=jax.random.key(2))
    two, _ = apply(params, model_state, x, key=jax.random.key(2))
    other, _ = apply(params, model_state, x, key=jax.random.key(3))
    np.testing.assert_array_equal(one, two)
    assert not np.allclose(one, other)
    assert not np.allclose(one, tested)
    assert not np.allclose(*(jax.tree.leaves(s)[0] for s in (moved, model_state)))


def test_a_transformer_does_not_look_ahead():
    model = _model("transformer", (16,), task="language", width=8, heads=2)
    params, model_state = _values(model)
    x = jnp.arange(16, dtype=jnp.int32)[None] % 10
    changed = x.at[0, 9].set(3 - x[0, 9] % 2)
    apply = jax.jit(model.apply)
    left, right = (apply(params, model_state, tokens)[0] for tokens in (x, changed))
    np.testing.assert_allclose(left[0, :9], right[0, :9], atol=1e-6)
    assert not np.allclose(left[0, 9:], right[0, 9:])


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("resnet", {"depth": 21}, r"model\.depth"),
        ("vgg", {"depth": 12}, r"model\.depth"),
        ("transformer", {"width": 10, "heads": 4}, r"model\.heads"),
        ("lenet", {"droput": 0.1}, r"model\.dropout"),
    ],
)
def test_a_mistake_names_the_key(name, options, wanted):
    with pytest.raises(ExperimentError, match=wanted):
        _model(name, COLOR, **options)


def test_a_model_that_does_not_fit_the_data_is_refused():
    with pytest.raises(ExperimentError, match="does not take some examples of shape"):
        _model("lenet", (30,))
