"""What the Lipschitz rate refuses, by name and with the way out."""

import jax.numpy as jnp
import pytest

import optalr
from tests.transforms.lipschitz_rate.problems import moments


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"loss": "hinge"}, "loss"),
        ({"loss": "softmax"}, "num_classes"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
        ({"averages": (1.0,)}, "averages"),
        ({"averages": (0.9, 0.9, 0.9)}, "averages"),
        ({"guards": {"min_rate": 2.0, "max_rate": 1.0}}, "max_rate"),
        ({"guards": {"warmup_rate": 0.0}}, "warmup_rate"),
        ({"guards": {"warmup_steps": -1}}, "warmup_steps"),
        ({"guards": {"max_step": 0.0}}, "max_step"),
        ({"guards": {"max_rise": -1.0}}, "max_rise"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        optalr.scale_by_lipschitz_rate(**{"loss": "sigmoid", **options})


def test_guards_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="guards"):
        optalr.scale_by_lipschitz_rate("sigmoid", guards="some")


def test_missing_extras_say_the_remedy():
    w = jnp.ones((6, 2))
    tx = optalr.scale_by_lipschitz_rate("sigmoid", weight_decay=0.1)
    with pytest.raises(TypeError, match=r"head.*value_grad_and_extras"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(TypeError, match="params"):
        tx.update(w, tx.init(w), head=moments(1.0))
