"""A loss with the arguments of one call: what is split, traced and handed on as ``Partial``s."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from optalr.signals.curvature import products as curvature
from optalr.signals.tracing.compat import varying_axes


@dataclasses.dataclass(frozen=True)
class CompositeLoss:
    """A loss given in two parts; see ``composite_loss``."""

    predict_fn: Callable[..., Any]
    output_loss: Callable[..., jax.Array]
    has_aux: bool = False
    output_product: Callable[..., Any] | None = None

    def __call__(self, params: Any, *args: Any) -> Any:
        """Return the loss, or ``(loss, aux)``."""
        if self.has_aux:
            outputs, aux = self.predict_fn(params, *args)
            return self.output_loss(outputs, *args), aux
        return self.output_loss(self.predict_fn(params, *args), *args)


def composite_loss(
    predict_fn: Callable[..., Any],
    output_loss: Callable[..., jax.Array],
    *,
    has_aux: bool = False,
    output_product: Callable[..., Any] | None = None,
) -> CompositeLoss:
    """Join a model and a loss of its outputs, so that Gauss-Newton products are defined.

    Choose it when a method reads ``extras["gauss_newton"]`` or ``extras["outputs"]`` (``edf``), or
    for the true Fisher; everything else works with a plain loss function as well.

    Args:
      predict_fn: ``predict_fn(params, *args) -> outputs``; with ``has_aux`` ``(outputs, aux)``,
        where aux is, for example, the new batch statistics.
      output_loss: ``output_loss(outputs, *args) -> scalar``, the mean over the batch.
      has_aux: whether ``predict_fn`` returns aux. Pass ``has_aux=True`` to
        ``value_grad_and_extras`` too.
      output_product: ``output_product(outputs, u, *args) -> H_L u``, the product with the Hessian
        of ``output_loss`` in the outputs, used in ``gauss_newton`` instead of differentiating
        ``output_loss`` twice: for an output loss whose second derivative does not exist or is not
        certain to be positive semidefinite. ``softmax_product``, ``sigmoid_product`` and
        ``squared_error_product`` are closed forms; give them the ``scale`` of the mean.

    Returns:
      A callable loss, ``loss(params, *args)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = composite_loss(lambda w, x, y: x @ w, lambda z, x, y: jnp.mean((z - y) ** 2))
      >>> float(loss(jnp.zeros((2, 1)), jnp.ones((3, 2)), jnp.ones((3, 1))))
      1.0

      With a closed form of the output loss's Hessian:

      >>> from optalr import squared_error_product
      >>> def closed_form(z, u, x, y):
      ...     return squared_error_product(z, u, scale=2 / z.size)
      >>> loss = composite_loss(
      ...     lambda w, x, y: x @ w,
      ...     lambda z, x, y: jnp.mean((z - y) ** 2),
      ...     output_product=closed_form,
      ... )
    """
    return CompositeLoss(predict_fn, output_loss, has_aux, output_product)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function with its arguments split into arrays, given later, and the rest, kept here.

    Equal bindings compare equal, so a ``Partial`` of one crosses ``jit`` without a retrace.
    """

    function: Callable[..., Any]
    treedef: Any
    kept: tuple[Any, ...]

    def args(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Put the arrays back among the arguments that were kept."""
        remaining = iter(arrays)
        leaves = [next(remaining) if kept is _ARRAY else kept for kept in self.kept]
        return jax.tree.unflatten(self.treedef, leaves)

    def __call__(self, arrays: Sequence[Any], *first: Any) -> Any:
        """Return the function's value on ``first`` and its bound arguments."""
        return self.function(*first, *self.args(arrays))


def bind(function: Callable[..., Any], args: Any) -> tuple[Bound, tuple[Any, ...]]:
    """Return a function with its arguments bound, and the arrays that it is then called on."""
    leaves, treedef = jax.tree.flatten(args)
    kept = tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves)
    return Bound(function, treedef, kept), tuple(leaf for leaf in leaves if _is_array(leaf))


class _Array:
    """Marks the place of an array among the kept arguments."""

    def __repr__(self) -> str:
        return "<array>"


_ARRAY = _Array()


@dataclasses.dataclass(frozen=True)
class _First:
    """A function that keeps the first of two results."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)[0]


@dataclasses.dataclass(frozen=True)
class _Averaged:
    """A loss averaged over a mesh axis if it varies over it."""

    function: Callable[..., Any]
    axis_name: str

    def __call__(self, *args: Any) -> Any:
        return _mean_over(self.function(*args), self.axis_name)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss and the arguments of one call."""

    loss_fn: Callable[..., Any]
    has_aux: bool | None  # None: whatever the loss returns
    bound: Bound
    arrays: tuple[Any, ...]

    @classmethod
    def of(
        cls, loss_fn: Callable[..., Any], has_aux: bool | None, params: Any, args: Any
    ) -> "Problem":
        """Check the parameters and split the arguments."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            dtype = jnp.result_type(leaf) if _is_number(leaf) else type(leaf)
            if not _is_number(leaf) or not jnp.issubdtype(dtype, jnp.floating):
                name = jax.tree_util.keystr(path) or "params"
                raise TypeError(
                    f"params must be a pytree of floating arrays, but {name} is {dtype}. Keep what "
                    "is not trained (counters, keys, functions) out of params and pass it as a "
                    "further argument of loss_fn."
                )
        return cls(loss_fn, has_aux, *bind(loss_fn, args))

    def value_fn(self, axis_name: str | None) -> Partial:
        """Return ``params -> loss`` on this call's arguments."""
        function = _First(self.bound) if self.has_aux else self.bound
        if axis_name is not None:
            function = _Averaged(function, axis_name)
        return Partial(function, self.arrays)

    def products(self, params: Any, value_fn: Partial) -> dict[str, Any]:
        """Return the curvature products, and the outputs of a composite loss."""
        found: dict[str, Any] = {"hessian": curvature.hessian_product(value_fn, params)}
        if not isinstance(self.loss_fn, CompositeLoss):
            return found
        predict = self.predict_fn(self.arrays)
        output_loss = dataclasses.replace(self.bound, function=self.loss_fn.output_loss)
        found["outputs"] = predict(params)
        closed_form = self.loss_fn.output_product
        if closed_form is not None:
            bound = dataclasses.replace(self.bound, function=closed_form)
            closed_form = Partial(bound, self.arrays)
        found["gauss_newton"] = curvature.gauss_newton_product(
            predict, Partial(output_loss, self.arrays), params, output_product=closed_form
        )
        return found

    def predict_fn(self, arrays: Any) -> Partial:
        """Return ``params -> outputs`` of a composite loss on ``arrays``."""
        assert isinstance(self.loss_fn, CompositeLoss)
        bound = dataclasses.replace(self.bound, function=self.loss_fn.predict_fn)
        return Partial(_First(bound) if self.loss_fn.has_aux else bound, arrays)


@dataclasses.dataclass(frozen=True)
class Traced:
    """The loss of one call as a jaxpr of flat inputs (parameter leaves, arrays)."""

    closed: Any
    inputs: tuple[Any, ...]
    treedef: Any
    paths: tuple[str, ...]
    aux_tree: Any

    @property
    def num_leaves(self) -> int:
        """How many parameter leaves there are."""
        return len(self.paths)

    @property
    def leaves(self) -> tuple[Any, ...]:
        """The parameter leaves."""
        return self.inputs[: self.num_leaves]

    @property
    def leaf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Their shapes."""
        return tuple(jnp.shape(leaf) for leaf in self.leaves)


def trace_predictions(problem: Problem, params: Any) -> Traced:
    """Trace the outputs of a composite loss's model, likewise; ``aux_tree`` is their structure."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = tuple(leaf for _, leaf in with_paths)
    out_trees: list[Any] = []

    def flat_predict(leaves, arrays):
        outputs = problem.predict_fn(arrays)(jax.tree.unflatten(treedef, leaves))
        out_leaves, out_tree = jax.tree.flatten(outputs)
        out_trees.append(out_tree)
        return out_leaves

    closed = jax.make_jaxpr(flat_predict)(leaves, problem.arrays)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in with_paths)
    return Traced(closed, (*leaves, *problem.arrays), treedef, paths, out_trees[-1])


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_number(leaf: Any) -> bool:
    return _is_array(leaf) or isinstance(leaf, float | int | complex)


def trace(problem: Problem, params: Any, axis_name: str | None) -> Traced:
    """Trace the loss once, with parameter leaves and array arguments as flat inputs."""
    if axis_name is not None and not any(
        axis_name in varying_axes(jax.typeof(array)) for array in problem.arrays
    ):
        raise ValueError(
            f"axis_name={axis_name!r}, but no argument of the loss varies over that axis. Call "
            "evaluate inside jax.shard_map with the batch sharded over it, and leave check_vma on."
        )
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = tuple(leaf for _, leaf in with_paths)
    aux_trees: list[Any] = []

    def flat_loss(leaves, arrays):
        result = problem.bound(arrays, jax.tree.unflatten(treedef, leaves))
        if problem.has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError("loss_fn must return (loss, aux) when has_aux=True.")
        split = isinstance(result, tuple) if problem.has_aux is None else problem.has_aux
        loss, aux = result if split else (result, None)
        _check_scalar(loss)
        if axis_name is not None:
            loss = _mean_over(loss, axis_name)
        aux_leaves, aux_tree = jax.tree.flatten(aux)
        aux_trees.append(aux_tree)
        return [loss, *aux_leaves]

    closed = jax.make_jaxpr(flat_loss)(leaves, problem.arrays)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in with_paths)
    return Traced(closed, (*leaves, *problem.arrays), treedef, paths, aux_trees[-1])


def _check_scalar(loss: Any) -> None:
    if isinstance(loss, tuple):
        raise TypeError(
            "loss_fn must return a scalar, got a tuple. If its second entry is auxiliary, pass "
            "has_aux=True to value_grad_and_extras."
        )
    shape = getattr(loss, "shape", () if isinstance(loss, float) else None)
    if shape != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        what = f"shape {shape}" if shape is not None else repr(type(loss))
        raise TypeError(
            f"loss_fn must return a floating scalar, the mean loss over the batch, got {what}. "
            "Take jnp.mean over the examples' losses."
        )


def _mean_over(loss: Any, axis_name: str) -> Any:
    """Average a loss over a mesh axis if it differs between the axis's devices."""
    varies = axis_name in varying_axes(jax.typeof(loss))
    return jax.lax.pmean(loss, axis_name) if varies else loss
