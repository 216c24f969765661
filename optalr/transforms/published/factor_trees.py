"""Which leaves are kernels with two factors, and how a state holds these as trees."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arrays import wide_dtype
from optalr.signals.coverage import Coverage
from optalr.signals.moments import LayerMoments, LeafView, default_view, is_moments
from optalr.states import unboxed

# Stands in place of what a leaf does not keep: a pytree node without leaves.
_NOTHING = optax.MaskedNode()


@dataclasses.dataclass(frozen=True)
class Layer:
    """A leaf that is a layer's kernel, and where it stands."""

    path: str
    shape: tuple[int, ...]
    view: LeafView

    @property
    def sides(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the rows' and of the columns' factor."""
        stack, m, n = self.view.matrix_shape(self.shape)
        return (*stack, m, m), (*stack, n, n)


class Factors(NamedTuple):
    """What is kept of one layer."""

    rows: jax.Array
    cols: jax.Array


def layers_of(tree: Any, layout: Coverage | None, max_size: int) -> dict[int, Layer]:
    """Return the leaves that may be kernels, by position.

    Raises:
      ValueError: a side is longer than ``max_size``.
    """
    layers = {}
    for i, (path, leaf) in enumerate(zip(paths_of(tree), jax.tree.leaves(tree), strict=True)):
        view = _view(path, leaf, layout)
        if view is not None and leaf.size:
            layers[i] = layer = Layer(path, tuple(leaf.shape), view)
            _check_size(layer, max_size)
    return layers


def _check_size(layer: Layer, max_size: int) -> None:
    longest = max(shape[-1] for shape in layer.sides)
    if longest > max_size:
        numbers = 2 * sum(side[-1] ** 2 for side in layer.sides)
        raise ValueError(
            f"max_size={max_size} is less than a side of {layer.path}, of shape "
            f"{layer.shape}, whose factors and roots would take {4 * numbers:,} bytes. Raise "
            "it; or pass layout=optalr.coverage(loss_fn, params, *args) if the leaf is no "
            "layer; or take optalr.tso_alra, which keeps a diagonal of long sides."
        )


def _view(path: str, leaf: Any, layout: Coverage | None) -> LeafView | None:
    """Return how a leaf is seen as a matrix, or None where it is no kernel."""
    if layout is None:
        return default_view(leaf.shape)
    known = layout[path] if path in layout.treatment else None
    return known.view if known is not None and known.treatment == "kronecker" else None


def paths_of(tree: Any) -> list[str]:
    """Return the key paths of all leaves."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def moments_by_path(signals: Any) -> dict[str, LayerMoments]:
    """Return what was captured, by the key path of its kernel."""
    found = jax.tree_util.tree_leaves_with_path(signals, is_leaf=is_moments)
    return {jax.tree_util.keystr(path): node for path, node in found if is_moments(node)}


def start(layer: Layer, leaf: jax.Array, make: Callable[..., jax.Array]) -> Factors:
    """Return what a layer begins with: ``make(shape, dtype)`` for each side."""
    return Factors(*(make(shape, wide_dtype(leaf)) for shape in layer.sides))


def identity(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return a stack of identities of this shape, in a buffer of its own."""
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape).copy()


def to_trees(
    like: Any, factors: Mapping[int, Factors], roots: Mapping[int, Factors]
) -> dict[str, Any]:
    """Return the state's trees, whose leaves stand without the boxes of their parameters."""
    structure = jax.tree.structure(unboxed(like))

    def tree(kept: Mapping[int, Any]) -> Any:
        return structure.unflatten([kept.get(i, _NOTHING) for i in range(structure.num_leaves)])

    return {
        "row_factor": tree({i: pair.rows for i, pair in factors.items()}),
        "col_factor": tree({i: pair.cols for i, pair in factors.items()}),
        "row_root": tree({i: pair.rows for i, pair in roots.items()}),
        "col_root": tree({i: pair.cols for i, pair in roots.items()}),
    }


def from_trees(rows: Any, cols: Any, like: Any) -> dict[int, Factors]:
    """Undo ``to_trees`` for one pair of trees."""
    structure = jax.tree.structure(unboxed(like))
    pairs = zip(structure.flatten_up_to(rows), structure.flatten_up_to(cols), strict=True)
    return {
        i: Factors(*pair)
        for i, pair in enumerate(pairs)
        if not isinstance(pair[0], optax.MaskedNode)
    }
