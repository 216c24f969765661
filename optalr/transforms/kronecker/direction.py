"""The direction: ``F^p vec(G) = vec(A^p G B^p)``, leaf by leaf."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import damped_power
from optalr.transforms.kronecker.leaves import Bias, Elementwise, JointBias, Kernel
from optalr.transforms.kronecker.memory import LeafMemory, roots_of
from optalr.transforms.kronecker.rule import Rule
from optalr.transforms.kronecker.spectrum import Spectrum, Step


def kernel_direction(
    spectrum: Spectrum, leaf: Kernel, memory: LeafMemory, *, gradient: jax.Array, ready: jax.Array
) -> jax.Array:
    """Return the direction of one kernel from its gradient, both as padded matrices."""
    G = gradient
    if not spectrum.keeps_eigenvalues:
        A, B = roots_of(leaf, memory)  # (A + λ_A)^p and (B + λ_B)^p
        return A @ G @ B.T  # B.T is B up to rounding, but its last bits differ
    Q_A, Q_B = roots_of(leaf, memory)  # eigenbases
    turned = Q_A.T @ G @ Q_B
    for gains in spectrum.gains(memory):  # (v + λ)^p; 1 before the first refresh
        turned = turned * jnp.where(ready, gains, 1)
    return Q_A @ turned @ Q_B.T


def bias_direction(
    spectrum: Spectrum, leaf: Bias, memory: LeafMemory, *, gradient: jax.Array, ready: jax.Array
) -> jax.Array:
    """Return ``B^p b`` for a bias b, from the output side of its kernel's memory."""
    kernel = leaf.layer
    side, kept = kernel.sides[kernel.output_side], memory.sides[kernel.output_side]
    b = side.pad(gradient.reshape(*kernel.stack, -1, 1), -2)
    B = side.holding(kept.root)
    if not spectrum.keeps_eigenvalues:
        direction = B @ b
    else:
        gains = jnp.where(ready, spectrum.gains_of_side(kept), 1)
        direction = B @ (gains[..., :, None] * (B.T @ b))
    return direction[..., : side.size, 0].reshape(gradient.shape).astype(gradient.dtype)


def elementwise_direction(rule: Rule, gradient: jax.Array, moment: jax.Array) -> jax.Array:
    """Return ``(v + λ)^p g`` for each number of a leaf."""
    added = rule.damping
    if rule.damping_form.is_relative:
        added = added * jnp.mean(moment)
    return damped_power(moment, jnp.asarray(added, moment.dtype), rule.power) * gradient


def directions(
    step: Step, memories: Sequence[LeafMemory], state: Any, *, grads: Sequence[jax.Array]
) -> list[jax.Array]:
    """Return ``F^p g`` for each leaf. Before the first roots that is the gradient itself."""
    spectrum, ready, weight = step.spectrum, state.num_refreshes > 0, state.weight
    updates: list[Any] = list(grads)
    scale = 1 / jnp.where(weight > 0, weight, 1)
    for i, (leaf, memory, g) in enumerate(zip(step.leaves, memories, grads, strict=True)):
        if isinstance(leaf, JointBias):
            continue  # a row of its kernel's matrix, which sets its update below
        if isinstance(leaf, Bias):
            kernel = memories[leaf.kernel]
            updates[i] = bias_direction(spectrum, leaf, kernel, gradient=g, ready=ready)
        elif isinstance(leaf, Elementwise):
            moment = memory.second_moment * scale.astype(g.dtype)
            direction = elementwise_direction(spectrum.rule, g, moment)
            updates[i] = jnp.where(ready, direction, g)
        elif isinstance(leaf, Kernel):
            matrix = leaf.pad(leaf.to_matrix(grads, i))
            direction = kernel_direction(spectrum, leaf, memory, gradient=matrix, ready=ready)
            updates[i], bias = leaf.from_matrix(direction)
            if leaf.joint_bias is not None and bias is not None:
                own = grads[leaf.joint_bias]
                updates[leaf.joint_bias] = bias.reshape(own.shape).astype(own.dtype)
    return updates
