"""What the flow refuses, by name and with the way out."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optalr
from optalr import LevenbergMarquardt, scale_by_krylov_flow


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"curvature": "fisher"}, ValueError, "curvature"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_steps": 2.0}, TypeError, "num_steps"),
        ({"num_steps": True}, TypeError, "num_steps"),
        ({"damping": (1.0, lambda count: 1.0)}, TypeError, r"damping\[1\]"),
        ({"tol": lambda count: 0.1}, TypeError, "tol"),
        ({"damping": (-1.0, 1.0)}, ValueError, r"damping\[0\]"),
        ({"damping": (1.0, float("nan"))}, ValueError, r"damping\[1\]"),
        ({"damping": 0.1}, TypeError, "damping.*pair"),
        ({"damping": LevenbergMarquardt(initial=0.0)}, ValueError, "damping.initial"),
        ({"damping": LevenbergMarquardt(grow=1.0)}, ValueError, "damping.grow"),
        ({"damping": LevenbergMarquardt(low=0.9)}, ValueError, "damping.low"),
        ({"tol": 1.0}, ValueError, "tol"),
        ({"negative_curvature": "flip"}, ValueError, "negative_curvature"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, match):
    with pytest.raises(error, match=match):
        scale_by_krylov_flow(**kwargs)


def test_bad_recipe_arguments_are_named():
    with pytest.raises(ValueError, match="acceleration"):
        optalr.edf(0.1, acceleration="W3")
    with pytest.raises(ValueError, match="learning_rate"):
        optalr.edf(-0.1)


def test_missing_extras_are_named_with_the_remedy():
    tx = scale_by_krylov_flow()
    grads = jnp.ones(2)
    with pytest.raises(TypeError, match=r"gauss_newton.*composite_loss"):
        tx.update(grads, tx.init(grads))
    tx = scale_by_krylov_flow(curvature="hessian", damping=LevenbergMarquardt())
    with pytest.raises(TypeError, match=r"'value'.*value_grad_and_extras"):
        tx.update(grads, tx.init(grads), hessian=lambda v: v)
    injected = optax.inject_hyperparams(optalr.edf)(0.1)
    with pytest.raises(TypeError, match=r"num_steps.*static_args"):
        jax.jit(injected.init)(grads)
