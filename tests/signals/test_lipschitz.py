"""The standalone Lipschitz constants: the paper's own numbers, and NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import optalr


def test_the_papers_own_numbers():
    constant = optalr.lipschitz_constant(
        "softmax_cross_entropy",
        206.695,
        128,
        num_classes=10,
        weight_norm=43.257,
        weight_decay=1e-3,
    )
    assert round(float(1 / constant), 3) == 0.668


def test_each_loss_against_numpy():
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(16, 5)) * scale for scale in (1.0, 3.0, 2.0)]
    weights = {"a": rng.normal(size=(5, 7)), "b": 100 * rng.normal(size=7)}
    outputs, targets = rng.normal(size=(2, 3, 16, 1))
    K_z = max(np.linalg.norm(a) for a in batches)
    max_W = np.linalg.norm(weights["a"])  # biases are no weights
    expected = {
        "softmax_cross_entropy": 3 / (4 * 16) * K_z,
        "binary_cross_entropy": K_z / 32,
        "least_squares": (max(map(np.linalg.norm, outputs)) + max(map(np.linalg.norm, targets)))
        * K_z
        / 16,
    }
    arrays = [jnp.asarray(a, jnp.float32) for a in batches]
    for loss, constant in expected.items():
        found = optalr.lipschitz_rate(
            loss,
            arrays,
            weights,
            num_classes=4,
            outputs=list(outputs),
            targets=list(targets),
            weight_decay=0.01,
        )
        np.testing.assert_allclose(found.activation_norm, K_z, rtol=1e-6)
        np.testing.assert_allclose(found.weight_norm, max_W, rtol=1e-6)
        np.testing.assert_allclose(found.constant, constant + 0.01 * max_W, rtol=1e-6)
        np.testing.assert_allclose(found.learning_rate * found.constant, 1, rtol=1e-6)


def test_other_names_of_the_losses():
    same = [
        optalr.lipschitz_constant(name, 2.0, 4, num_classes=3)
        for name in ("softmax_cross_entropy", "softmax", "cross_entropy")
    ]
    assert len({float(x) for x in same}) == 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"loss": "hinge"}, "loss"),
        ({"loss": "softmax"}, "num_classes"),
        ({"loss": "softmax", "num_classes": 1}, "num_classes"),
        ({"loss": "least_squares", "target_norm": 1.0}, "output_norm"),
        ({"loss": "least_squares", "output_norm": 1.0}, "target_norm"),
        ({"loss": "sigmoid", "weight_decay": -1.0}, "weight_decay"),
        ({"loss": "sigmoid", "batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, name):
    with pytest.raises(ValueError, match=name):
        optalr.lipschitz_constant(**{"activation_norm": 1.0, "batch_size": 2, **arguments})


def test_bad_arrays_are_refused_by_name():
    with pytest.raises(ValueError, match="activations"):
        optalr.lipschitz_rate("sigmoid", [jnp.ones((2, 2)), jnp.ones((3, 2))])
    with pytest.raises(ValueError, match="weights"):
        optalr.lipschitz_rate("sigmoid", jnp.ones((2, 2)), weight_decay=0.1)
