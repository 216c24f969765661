"""What the compiled step of the flow looks like: its memory, its branches."""

import jax
import jax.numpy as jnp
import optax

import optalr
from optalr import scale_by_krylov_flow
from tests.transforms.krylov_flow.problems import EVALUATE, squared


def test_memory_does_not_grow_with_the_krylov_steps():
    params = {"w1": jnp.ones((64, 256)), "w2": jnp.ones((256, 3)), "b": jnp.zeros(3)}
    size = sum(leaf.nbytes for leaf in params.values())
    x, y = jnp.ones((32, 64)), jnp.ones((32, 3)) / 3

    def temporary_bytes(k):
        tx = scale_by_krylov_flow(num_steps=k)

        def run(params):
            _, grads, extras = EVALUATE(params, x, y, signals=False)
            return tx.update(grads, tx.init(params), params, **extras)[0]

        compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
        return compiled.lower(params).compile().memory_analysis().temp_size_in_bytes

    # Up to some eight steps the compiler still finds more to overlap.
    assert temporary_bytes(12) <= temporary_bytes(8) + size // 4


def convolutions(jaxpr, inside=False):
    """Yield for every convolution whether it stands inside control flow."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "conv_general_dilated":
            yield inside
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                yield from convolutions(sub, inside or name in ("cond", "scan", "while"))


def test_no_convolution_stands_inside_control_flow():
    # On a CPU XLA runs gradients of convolutions ten times slower there.
    def net(w, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
        return jnp.tanh(x).reshape(2, -1)

    loss = optalr.composite_loss(net, lambda z, x: squared(z))
    w, x = jnp.ones((3, 3, 1, 2)) / 9, jnp.ones((2, 4, 4, 1))

    def step(tx):
        def run(w, state):
            _, grads, extras = optalr.value_grad_and_extras(loss)(w, x, signals=False)
            return jax.jit(tx.update)(grads, state, w, **extras)

        return list(convolutions(jax.make_jaxpr(run)(w, tx.init(w)).jaxpr))

    flow = scale_by_krylov_flow(num_steps=2)
    found = step(flow)
    assert len(found) > 2
    assert not any(found)
    assert any(step(optax.apply_if_finite(flow, 1)))  # the walk sees those that are
