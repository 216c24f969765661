"""By how much a loss rises as the decay shrinks the weights: one derivative, and no step.

In: a loss, the full parameters and the leaves that decay. Out: ``−⟨∇L(θ), θ_m⟩``, of all these
leaves together or of each.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arguments import check_choice, check_count, is_concrete, require_extra
from optalr.arrays import wide_dtype
from optalr.clocks import measure_when
from optalr.signals.ray import by_path
from optalr.states import unboxed
from optalr.transforms.shared.subtrees import check_places

METHOD = "add_learned_decay"
_REMEDY = (
    "Pass {probe}=jax.tree_util.Partial(loss_fn, x=x, y=y) to update, with a batch that is not "
    "trained on."
)

# The decaying leaves by key path, and the loss as a function of them.
_Leaves = dict[str, jax.Array]
_Value = Callable[[_Leaves], jax.Array]


@dataclasses.dataclass(frozen=True)
class SlopeProbe:
    """What measures the slope; the fields are arguments of ``add_learned_decay``.

    Attributes:
      name: that of the extra that holds the loss, the argument ``probe``.
      every: steps between probes.
      derivative: ``"forward"`` or ``"backward"``.
      per_leaf: whether each leaf has a slope of its own.
      required: whether a step without the extra is an error.
    """

    name: str
    every: Any
    derivative: str
    per_leaf: bool
    required: bool

    def __post_init__(self):
        check_count("every", self.every)
        check_choice("derivative", self.derivative, ("forward", "backward"))

    def is_missing(self, extras: dict[str, Any]) -> bool:
        """Return whether there is nothing to probe, and need not be."""
        return not self.required and self.name not in extras

    def due(self, extras: dict[str, Any], count: jax.Array) -> jax.Array:
        """Return whether the update after ``count`` others measures a slope."""
        if self.is_missing(extras):
            return jnp.zeros((), bool)
        return count % jnp.asarray(self.every, jnp.int32) == 0

    def read(
        self, extras: dict[str, Any], decaying: Any, *, params: Any, due: jax.Array, may: Any
    ) -> Any:
        """Return the slope, float32, and zero where none is due.

        Args:
          extras: what reached ``update``.
          decaying: θ_m, a tree that holds leaves of the full parameters, by key path.
          params: the parameters, for a caller that gives no ``point``.
          due: () bool.
          may: whether anything may be due; a NumPy bool where that is known.

        Returns:
          A scalar, or with ``per_leaf`` a tree of them with the structure of ``unboxed(decaying)``.
        """
        if self.is_missing(extras):
            zero = jnp.zeros((), jnp.float32)
            return jax.tree.map(lambda _: zero, unboxed(decaying)) if self.per_leaf else zero
        remedy = "" if self.name == "value_fn" else _REMEDY.format(probe=self.name)
        value_fn = require_extra(extras, self.name, METHOD, remedy)
        point = extras.get("point", params)
        # All leaves, not those that decay alone: a flattened tree has none of two axes.
        check_places(METHOD, params, point)
        decaying = unboxed(decaying)
        leaves, value = by_path(decaying), _as_function_of_leaves(value_fn, point)

        def measure() -> Any:
            if not self.per_leaf:
                return -self._along(value, leaves).astype(jnp.float32)
            products = _each(value, leaves)
            return jax.tree_util.tree_map_with_path(
                lambda path, _: -products[jax.tree_util.keystr(path)].astype(jnp.float32), decaying
            )

        if is_concrete(self.every) and int(self.every) == 1:
            return measure()  # always due: a branch would only hide the pass from XLA
        return measure_when(due, measure, may=may)

    def _along(self, value: _Value, leaves: _Leaves) -> jax.Array:
        """Return ``⟨∇L, θ_m⟩``."""
        if not leaves:
            return jnp.zeros((), jnp.float32)
        if self.derivative == "forward":
            # The tangent of each weight is the weight, so XLA finds two of a layer's three
            # products to be one.
            return jax.jvp(value, (leaves,), (leaves,))[1]
        products = list(_each(value, leaves).values())
        return sum(products[1:], start=products[0])


def _as_function_of_leaves(value_fn: Callable[[Any], Any], point: Any) -> _Value:
    """Return the loss as a function of some leaves; all others stay."""
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(unboxed(point))]
    rest, treedef = jax.tree.flatten(point)

    def value(leaves: _Leaves) -> jax.Array:
        full = [leaves.get(path, leaf) for path, leaf in zip(paths, rest, strict=True)]
        loss = jnp.asarray(value_fn(treedef.unflatten(full)))
        return loss.astype(wide_dtype(loss))

    return value


def _each(value: _Value, leaves: _Leaves) -> _Leaves:
    """Return ``⟨∂L/∂θ_i, θ_i⟩`` of each leaf, from one gradient."""

    def product(slope: jax.Array, leaf: jax.Array) -> jax.Array:
        # Without a conjugate: that is how jax.grad states the slope of a complex leaf.
        dtype = wide_dtype(leaf)
        return jnp.sum(slope.astype(dtype) * leaf.astype(dtype)).real

    return jax.tree.map(product, jax.grad(value)(leaves), leaves)
