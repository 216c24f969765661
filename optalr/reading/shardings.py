"""How a state is sharded over a mesh, told from how its parameters are."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from optalr.states import is_box, unboxed
from optalr.transforms.dense.block_diagonal import BlockDiagonalState
from optalr.transforms.dense.full_matrix import FullMatrixState
from optalr.transforms.kronecker.memory import SideMemory
from optalr.transforms.published.eigen_roots import EigenRootsState

# What holds matrices of a parameter's moments: one may have the parameter's shape by chance.
_OF_MATRICES = (SideMemory, BlockDiagonalState, FullMatrixState, EigenRootsState)
# Where a variable of nnx keeps the names of its axes; the last two in older releases.
_NNX_NAMES = ("out_sharding", "sharding_names", "sharding")


def state_shardings(
    tx: Any,
    params: Any,
    mesh: Any = None,
    *,
    param_shardings: Any = None,
    rules: Sequence[tuple[str, Any]] | None = None,
) -> Any:
    """Return a tree of ``NamedSharding`` for the state of any transformation.

    Choose it to make a state where it shall lie (a large one is then never held by one device), to
    restore a checkpoint on a mesh, or to keep a step's outputs sharded as its inputs are.

    * An array that follows a parameter is sharded as that is. It stands at the parameter's place in
      a tree like the parameters, and has the parameter's shape: moments, momentum, velocities. So
      does one with further axes in front, such as a window of the last gradients.
    * Kronecker factors, dense second moments and their roots are replicated, whatever their shape,
      unless the transformation itself says how they rest (``options.sharded_factors``).
    * All else, such as counts and rates, is replicated.

    Args:
      tx: a transformation, or anything with ``init``.
      params: the parameters, or their shapes; in boxes of Flax or out of them.
      mesh: a ``jax.sharding.Mesh``. None for that of the parameters' shardings.
      param_shardings: a tree like ``params`` of ``NamedSharding``, ``PartitionSpec`` or None
        (replicated), or one for all parameters. Without it each parameter speaks for itself: by
        its own ``NamedSharding``, else by the names in its box (linen's ``Partitioned`` and
        ``LogicallyPartitioned``, a variable of nnx), else it is replicated.
      rules: what names of axes stand for, pairs such as ``("mlp", "model")`` or ``("embed", None)``
        as Flax has them; the first whose mesh axis is still free holds. A name without a rule is an
        axis of the mesh.

    Returns:
      A tree with the structure of ``tx.init(params)``.

    Raises:
      TypeError: there is no mesh, or ``param_shardings`` holds something else.
      ValueError: ``param_shardings`` has not as many leaves as ``params``, or a name is neither an
        axis of the mesh nor in ``rules``.

    Cost: a trace of ``tx.init``. Nothing is computed.

    Examples:
      >>> import jax, jax.numpy as jnp, optalr, optax
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = {"w": jnp.zeros((8, 4))}
      >>> tx = optax.chain(optalr.scale_by_kronecker(), optax.trace(0.9))
      >>> by_rows = {"w": jax.P("data")}
      >>> shardings = optalr.state_shardings(tx, params, mesh, param_shardings=by_rows)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> state[1].trace["w"].sharding.spec == jax.P("data")
      True
      >>> state[0].memory.rows.root["w"].sharding.spec == jax.P()
      True
    """
    plain = unboxed(params)
    mesh = _mesh_of([mesh, *jax.tree.leaves(param_shardings), *map(_own, jax.tree.leaves(plain))])
    specs = _param_specs(params, param_shardings, _Names(mesh, rules))
    places = {
        path: (leaf.shape, spec) for (path, leaf), spec in zip(_leaves(plain), specs, strict=True)
    }
    state = _made_on(mesh, tx, _shapes(params))
    bare = unboxed(state)
    marks = jax.tree.map(_matrix_marks, bare, is_leaf=_holds_matrices)
    shardings = [
        NamedSharding(mesh, _typed(leaf) if is_matrix else _spec_at(path, leaf.shape, places))
        for (path, leaf), is_matrix in zip(_leaves(bare), jax.tree.leaves(marks), strict=True)
    ]
    return jax.tree.structure(state).unflatten(shardings)


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Return path and leaf of each leaf."""
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _shapes(params: Any) -> Any:
    """Return the parameters' shapes, on no mesh."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _made_on(mesh: Any, tx: Any, shapes: Any) -> Any:
    """Return the shapes of a state, with shardings where ``init`` itself chooses some.

    On a mesh with explicit axes the type of an array says how it is sharded.
    """
    explicit = (AxisType.Explicit,) * len(mesh.axis_names)
    sizes = tuple(mesh.shape[name] for name in mesh.axis_names)
    with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, mesh.axis_names, axis_types=explicit)):
        return jax.eval_shape(tx.init, shapes)


def _typed(leaf: Any) -> PartitionSpec:
    """Return the sharding in the type of an array of a state."""
    entries = [] if leaf.sharding is None else list(leaf.sharding.spec)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _holds_matrices(node: Any) -> bool:
    return isinstance(node, _OF_MATRICES)


def _matrix_marks(node: Any) -> Any:
    """Return for each leaf of a node whether it has no axes of a parameter."""
    return jax.tree.map(lambda _: _holds_matrices(node), node)


def _own(leaf: Any) -> Any:
    """Return the ``NamedSharding`` of an array or a shape, or None."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _mesh_of(candidates: Sequence[Any]) -> Any:
    """Return the first mesh, or mesh of a sharding."""
    meshes = (getattr(each, "mesh", each) for each in candidates)
    found = next((mesh for mesh in meshes if hasattr(mesh, "axis_names")), None)
    if found is None:
        raise TypeError(
            "mesh must be given where no parameter has a NamedSharding. Pass a mesh, such as "
            "jax.make_mesh((8,), ('data',))."
        )
    return found


def _spec_at(
    path: tuple[Any, ...], shape: tuple[int, ...], places: dict[Any, Any]
) -> PartitionSpec:
    """Return how an array of a state is sharded: as the parameter at the end of its path."""
    for start in range(len(path) + 1):
        if path[start:] in places:
            param_shape, spec = places[path[start:]]
            added = len(shape) - len(param_shape)
            if added >= 0 and shape[added:] == param_shape:
                return PartitionSpec(*(None,) * added, *spec)
    return PartitionSpec()


def _param_specs(params: Any, given: Any, names: "_Names") -> list[PartitionSpec]:
    """Return how each parameter is sharded."""
    if given is None:
        return [spec for _, spec in _specs_in(params, names)]
    leaves = jax.tree.leaves(given, is_leaf=lambda node: node is None or _is_sharding(node))
    for leaf in leaves:
        if leaf is not None and not _is_sharding(leaf):
            raise TypeError(
                "param_shardings must hold a NamedSharding, a PartitionSpec or None for each "
                f"parameter, got {leaf!r}."
            )
    number = jax.tree.structure(params).num_leaves
    if _is_sharding(given):
        leaves = leaves * number
    if len(leaves) != number:
        raise ValueError(
            f"param_shardings must have a leaf for each of {number} parameters, got {len(leaves)}."
        )
    return [getattr(leaf, "spec", leaf) or PartitionSpec() for leaf in leaves]


def _is_sharding(node: Any) -> bool:
    return isinstance(node, NamedSharding | PartitionSpec)


def _specs_in(tree: Any, names: "_Names") -> Iterator[tuple[Any, PartitionSpec]]:
    """Yield each parameter and its sharding, as it says itself."""
    for node in jax.tree.leaves(tree, is_leaf=is_box):
        for leaf in jax.tree.leaves(unboxed(node)):
            own = _own(leaf)
            axes = _axis_names(node) if is_box(node) else None
            if own is not None:
                yield leaf, own.spec
            else:
                yield leaf, PartitionSpec() if axes is None else names.spec(axes)


def _axis_names(box: Any) -> Sequence[Any] | None:
    """Return the names of the axes that a box holds, or None."""
    if hasattr(box, "names"):
        return box.names
    metadata = box.get_metadata() if hasattr(box, "get_metadata") else {}
    named = (metadata.get(key) for key in _NNX_NAMES)
    return next((names for names in named if names is not None), None)


class _Names:
    """What the names of parameters' axes stand for."""

    def __init__(self, mesh: Any, rules: Sequence[tuple[str, Any]] | None):
        self._mesh, self._rules = mesh, list(rules or ())

    def spec(self, names: Sequence[Any]) -> PartitionSpec:
        """Return the sharding of an array whose axes have these names."""
        used: list[str] = []
        return PartitionSpec(*(self._axis(name, used) for name in names))

    def _axis(self, name: Any, used: list[str]) -> Any:
        """Return the mesh axes of one axis, and note them as used."""
        if name is None or isinstance(name, tuple):  # a tuple names axes of the mesh
            return name
        meant = [axes for logical, axes in self._rules if logical == name]
        if not meant and name not in self._mesh.axis_names:
            raise ValueError(
                f"the axis {name!r} of a parameter is no axis of the mesh "
                f"{self._mesh.axis_names}. Pass rules=[({name!r}, None)] to replicate it, or the "
                "mesh's axis in place of None."
            )
        for axes in meant or [name]:
            wanted = [axes] if isinstance(axes, str) else list(axes or ())
            if not set(wanted) & set(used):
                used.extend(wanted)
                return axes
        return None
