"""The direction: ``F^p vec(G) = vec(A^p G B^p)``, leaf by leaf.

Where roots rest in parts, a kernel's products are made by the device that owns it. One all-to-all
brings each owner the rows of its gradients and roots, and another takes the updates back to rows. A
device then receives a share of all roots, and of all gradients, and does a share of the products.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import damped_power
from optalr.linalg import by_size, spd
from optalr.linalg.structured import Structured
from optalr.sharding.planning import Work
from optalr.sharding.solving import work_over
from optalr.sharding.spread import Spread
from optalr.signals.moments import OuterProducts, outer_products_pay
from optalr.transforms.kronecker.leaves import Bias, Elementwise, JointBias, Kernel
from optalr.transforms.kronecker.memory import LeafMemory, SideMemory, roots_of
from optalr.transforms.kronecker.rule import Rule
from optalr.transforms.kronecker.spectrum import Spectrum, Step

# A padded matrix, or the sum of outer products that it is.
Gradient = jax.Array | OuterProducts


def kernel_direction(
    spectrum: Spectrum, leaf: Kernel, memory: LeafMemory, *, gradient: Gradient, ready: jax.Array
) -> jax.Array:
    """Return the direction of one kernel from its gradient, both as padded matrices."""
    if not spectrum.keeps_eigenvalues:
        A, B = roots_of(leaf, memory)  # (A + λ_A)^p and (B + λ_B)^p
        return _between(A, gradient, B.T)  # B.T is B up to rounding, but its last bits differ
    Q_A, Q_B = roots_of(leaf, memory)  # eigenbases
    turned = _between(Q_A.T, gradient, Q_B)
    for gains in spectrum.gains(memory):  # (v + λ)^p; 1 before the first refresh
        turned = turned * jnp.where(ready, gains, 1)
    return Q_A @ turned @ Q_B.T


def _between(left: Structured, gradient: Gradient, right: Structured) -> jax.Array:
    """Return the product of three matrices, the gradient in the middle."""
    if isinstance(gradient, OuterProducts):
        return (left @ spd.transpose(gradient.left)) @ (gradient.right @ right)
    return left @ gradient @ right


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
    turned = _kernel_directions(step, memories, ready, grads=grads)
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
            updates[i], bias = leaf.from_matrix(turned[i])
            if leaf.joint_bias is not None and bias is not None:
                own = grads[leaf.joint_bias]
                updates[leaf.joint_bias] = bias.reshape(own.shape).astype(own.dtype)
    return updates


def _kernel_directions(
    step: Step, memories: Sequence[LeafMemory], ready: jax.Array, *, grads: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """Return the direction of each kernel, as a padded matrix, by its place among the leaves."""
    spectrum, spread = step.spectrum, step.spread
    mesh = spread.at_hand() if spread is not None and spread.rests else None
    turned: dict[int, jax.Array] = {}
    owned: dict[int, _Request] = {}
    for i, (leaf, memory) in enumerate(zip(step.leaves, memories, strict=True)):
        if not isinstance(leaf, Kernel):
            continue
        products = step.products.get(i)
        if products is not None and _pays(leaf, products):
            gradient = _padded(leaf, products)
            turned[i] = kernel_direction(spectrum, leaf, memory, gradient=gradient, ready=ready)
            continue
        matrix = leaf.pad(leaf.to_matrix(grads, i))
        if spread is not None and mesh is not None:
            request = _Request(spread, leaf, memory=memory, matrix=matrix)
            if request.cost and not request.in_stack:
                owned[i] = request
                continue
            if request.cost:
                # Each device has whole layers of a stack, whose gradients come to it.
                matrix = spread.at_rest(matrix)
        turned[i] = kernel_direction(spectrum, leaf, memory, gradient=matrix, ready=ready)
    if spread is not None and mesh is not None and owned:
        works = _works(spectrum, list(owned.values()), ready)
        for i, found in zip(owned, work_over(spread, mesh, works), strict=True):
            matrix = owned[i].matrix
            turned[i] = found.reshape(matrix.shape)
    return turned


def _pays(leaf: Kernel, products: OuterProducts) -> bool:
    """Return whether a kernel's gradient is to be multiplied as a sum of outer products."""
    # Without a layout a leaf may be seen as another matrix than its layer's. A joint bias has a
    # gradient of its own, with which theirs would have to be joined.
    if leaf.joint_bias is not None or not leaf.view.is_like(products.view):
        return False
    return outer_products_pay(products.left.shape[-2], leaf.sides)


def _padded(leaf: Kernel, products: OuterProducts) -> OuterProducts:
    left, right = leaf.rows.pad(products.left, -1), leaf.cols.pad(products.right, -1)
    return dataclasses.replace(products, left=left, right=right)


class _Request:
    """One kernel's gradient and what it is multiplied by, as stacks of matrices for their owners.

    Attributes:
      leaf: the kernel.
      matrix: its gradient, ``(*stack, m, n)``, padded.
      parts: the gradient and what the memory has of roots, each ``(k, ...)`` for a stack of k.
      structure: of the parts: a gradient and a memory.
      cuts: for each part, the axis of one matrix along which devices hold some of it, or None.
    """

    def __init__(self, spread: Spread, leaf: Kernel, *, memory: LeafMemory, matrix: jax.Array):
        self.leaf, self.matrix, self._spread = leaf, matrix, spread
        rows, cols = (
            SideMemory(root=side.root, eigenvalues=side.eigenvalues) for side in memory.sides
        )
        needed = LeafMemory(rows, cols, eigen_moment=memory.eigen_moment)
        arrays, self.structure = jax.tree.flatten((matrix, needed))
        depth = len(leaf.stack)
        self._rests = [spread.axis_of(array.shape) for array in arrays]
        self.parts = [array.reshape(-1, *array.shape[depth:]) for array in arrays]
        # A gradient that all devices have is cut as well. That sends little: each owner gets its
        # own. One that is sharded need not be gathered for it.
        self.cuts = [
            self.cut_of(part.shape[1:])
            if array.shape == matrix.shape
            else None
            if axis is None
            else axis - depth
            for part, array, axis in zip(self.parts, arrays, self._rests, strict=True)
        ]

    @property
    def in_stack(self) -> bool:
        """Whether each device has whole matrices of a stack, and so owns their products already."""
        return any(axis is not None and axis < len(self.leaf.stack) for axis in self._rests)

    @property
    def cost(self) -> int:
        """How many multiplications there are for one matrix; none between two diagonals."""
        rows, cols = self.leaf.sides
        return rows.padded_size * cols.padded_size * (rows.block + cols.block)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What requests have in common that make one stack."""
        forms = tuple((type(side), side.size, side.shape) for side in self.leaf.sides)
        return *forms, tuple((part.shape[1:], part.dtype) for part in self.parts)

    def cut_of(self, shape: tuple[int, ...]) -> int | None:
        """Return the first axis along which a matrix like the gradient can be cut, or None."""
        fitting = [axis for axis, n in enumerate(shape) if n % self._spread.num_devices == 0]
        return fitting[0] if fitting else None


def _works(spectrum: Spectrum, requests: Sequence[_Request], ready: jax.Array) -> list[Work]:
    """Return the products of all requests, stacked by kind."""
    kinds: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        kinds.setdefault(request.kind, []).append(place)
    works = []
    for places in kinds.values():
        first, *_ = members = [requests[place] for place in places]

        def solve(*parts: jax.Array, first=first) -> jax.Array:
            gradient, memory = first.structure.unflatten(parts)
            return kernel_direction(spectrum, first.leaf, memory, gradient=gradient, ready=ready)

        parts = by_size.joined([tuple(each.parts) for each in members])
        numbers = [each.parts[0].shape[0] for each in members]
        works.append(Work(solve, places, numbers, parts, first.cost, first.cuts, first.cut_of))
    return works
