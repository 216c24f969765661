"""A loss and the arguments of one call: bound, and traced.

In: the loss, the parameters and the further arguments. Out: the callables that ``extras`` holds,
all of them ``Partial``s (``Problem``), and jax's record of the loss as a list of equations
(``Traced``), whose inputs are flat, parameter leaves first.

Arguments are split (``binding``) into a ``Bound``, which is static, and arrays, which are not. Both
together make a ``Partial`` that a compiled program takes as an argument. A plain closure over the
arrays would be a new constant, and so a new compilation, at every step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from optalr.arguments import check_numbers
from optalr.signals.binding.bound import Bound, bind
from optalr.signals.binding.examples import refuse_if_all_empty
from optalr.signals.binding.neighbours import Tolerant
from optalr.signals.composite import CompositeLoss
from optalr.signals.curvature import gauss_newton_product, hessian_product
from optalr.signals.tracing.jaxprs import varying_axes

# What jax raises where a program asks for the value of an array that is only known by its shape.
_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss and the arguments of one call.

    Attributes:
      loss_fn: the loss, as it was given.
      has_aux: whether it returns ``(loss, aux)``; None for whatever it returns.
      bound: the loss with its arguments, but for the arrays among them.
      arrays: these arrays.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool | None
    bound: Bound
    arrays: tuple[Any, ...]

    @classmethod
    def of(
        cls, loss_fn: Callable[..., Any], params: Any, args: Any, *, has_aux: bool | None
    ) -> "Problem":
        """Check the parameters and split the arguments."""
        # Integer leaves would get gradients of dtype float0, which fail far from here.
        check_numbers("params", params, floating=True)
        bound, arrays = bind(loss_fn, args)
        refuse_if_all_empty(loss_fn, args, arrays)
        return cls(loss_fn, has_aux, bound, arrays)

    @property
    def halves(self) -> tuple[Bound, tuple[Any, ...]]:
        """The bound loss and its arrays."""
        return self.bound, self.arrays

    def settled(self, params: Any) -> "Problem":
        """Return the problem in the form in which its loss can be traced; see ``pose``."""
        if self.bound.places:
            try:
                jax.eval_shape(self.bound, self.arrays, params)
            except _LOOKS_AT_VALUES:
                return self.kept_whole()
        return self

    def kept_whole(self) -> "Problem":
        """Return the problem with the arrays that the loss holds left in it, as constants."""
        bound = dataclasses.replace(self.bound, closure=None)
        return dataclasses.replace(self, bound=bound, arrays=self.arrays[len(self.bound.places) :])

    def value_fn(self, axis_name: str | None) -> Partial:
        """Return ``params -> loss`` on this call's arguments."""
        function = _First(self.bound) if self.has_aux else self.bound
        if axis_name is not None:
            function = _Averaged(function, axis_name)
        return Partial(Tolerant(function), self.arrays)

    def products(self, params: Any, value_fn: Partial) -> dict[str, Any]:
        """Return the curvature products, and the outputs of a composite loss."""
        found: dict[str, Any] = {"hessian": hessian_product(value_fn, params)}
        loss = self.loss_fn
        if not isinstance(loss, CompositeLoss):
            return found
        predict = Partial(predictions(loss, self.bound), self.arrays)
        found["outputs"] = predict(params)
        # Partials throughout: what they bind crosses a jit as data, and a new batch needs no trace.
        found["gauss_newton"] = gauss_newton_product(
            predict,
            self._field("output_loss"),
            params,
            output_product=None if loss.output_product is None else self._field("output_product"),
        )
        return found

    def _field(self, name: str) -> Partial:
        """Return a function of a composite loss bound to this call's arguments."""
        return Partial(_Field(self.bound, name), self.arrays)


def predictions(loss: CompositeLoss, bound: Bound) -> Callable[..., Any]:
    """Return ``(arrays, params) -> outputs`` of a composite loss with its arguments bound."""
    predict = _Field(bound, "predict_fn")
    return _First(predict) if loss.has_aux else predict


def mean_over(loss: Any, axis_name: str) -> Any:
    """Average a loss over a mesh axis if it differs between the axis's devices."""
    # A loss that the user has averaged over the axis no longer varies over it, and is left alone.
    varies = axis_name in varying_axes(jax.typeof(loss))
    return jax.lax.pmean(loss, axis_name) if varies else loss


# The wrappers are dataclasses rather than closures, so that equal ones compare equal and their
# Partials cross ``jit`` without a retrace.


@dataclasses.dataclass(frozen=True)
class _Field:
    """One of the functions of a composite loss, with the loss's arguments bound."""

    bound: Bound
    name: str

    def __call__(self, arrays: Sequence[Any], *first: Any) -> Any:
        loss, args = self.bound.opened(arrays)
        return getattr(loss, self.name)(*first, *args)


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
        return mean_over(self.function(*args), self.axis_name)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function of parameters and arrays as a jaxpr of flat inputs.

    Attributes:
      closed: the ``ClosedJaxpr`` of (parameter leaves, arrays) -> flat outputs.
      inputs: the values of its inputs.
      treedef: the structure of the parameters.
      paths: the key path of each parameter leaf.
      aux_tree: the structure of the outputs after the loss (of all outputs, of a traced model).
      num_held: how many of the inputs after the leaves are arrays that the loss holds itself.
    """

    closed: Any
    inputs: tuple[Any, ...]
    treedef: Any
    paths: tuple[str, ...]
    aux_tree: Any
    num_held: int = 0

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


def pose(
    loss_fn: Callable[..., Any],
    params: Any,
    args: Any,
    *,
    has_aux: bool | None,
    axis_name: str | None,
) -> tuple[Problem, Traced]:
    """Return a problem and its trace.

    The arrays that the loss holds become inputs of the trace. A loss may look at their values (a
    mask that selects rows, say), which no trace can do. They then stay constants of the loss.
    """
    problem = Problem.of(loss_fn, params, args, has_aux=has_aux)
    try:
        return problem, trace(problem, params, axis_name)
    except _LOOKS_AT_VALUES:
        if not problem.bound.places:
            raise
    problem = problem.kept_whole()
    return problem, trace(problem, params, axis_name)


def trace(problem: Problem, params: Any, axis_name: str | None) -> Traced:
    """Trace the loss once, with parameter leaves and array arguments as flat inputs.

    Args:
      problem: the loss and its arguments.
      params: the parameters.
      axis_name: the mesh axis over which the loss is averaged, or None.

    Raises:
      TypeError: the loss is no floating scalar, or not ``(loss, aux)`` where it should be.
      ValueError: nothing varies over ``axis_name``.
    """
    if axis_name is not None and not any(
        axis_name in varying_axes(jax.typeof(array)) for array in problem.arrays
    ):
        # Without check_vma jax does not track what varies, and a loss local to each device could
        # not be told from one that is averaged already.
        raise ValueError(
            f"axis_name={axis_name!r}, but no argument of the loss varies over that axis. Call "
            "evaluate inside jax.shard_map with the batch sharded over it, and leave check_vma on."
        )

    def loss_and_aux(params: Any, arrays: Any) -> tuple[list[Any], Any]:
        result = problem.bound(arrays, params)
        if problem.has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError("loss_fn must return (loss, aux) when has_aux=True.")
        split = isinstance(result, tuple) if problem.has_aux is None else problem.has_aux
        if split and len(result) != 2:
            raise TypeError(
                f"loss_fn must return a loss, or (loss, aux), got {len(result)} results. Pass the "
                "loss itself, not what value_grad_and_extras made of it."
            )
        loss, aux = result if split else (result, None)
        _check_scalar(loss)
        if axis_name is not None:
            loss = mean_over(loss, axis_name)
        aux_leaves, aux_tree = jax.tree.flatten(aux)
        return [loss, *aux_leaves], aux_tree

    traced = trace_flat(loss_and_aux, params, problem.arrays)
    return dataclasses.replace(traced, num_held=len(problem.bound.places))


def trace_flat(
    function: Callable[[Any, Any], tuple[list[Any], Any]], params: Any, arrays: tuple[Any, ...]
) -> Traced:
    """Trace ``function(params, arrays) -> (flat outputs, a structure)``."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = tuple(leaf for _, leaf in with_paths)
    # A structure is no array, so it leaves the trace by the side.
    trees: list[Any] = []

    def flat(leaves: Any, arrays: Any) -> list[Any]:
        outputs, tree = function(jax.tree.unflatten(treedef, leaves), arrays)
        trees.append(tree)
        return outputs

    closed = jax.make_jaxpr(flat)(leaves, arrays)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in with_paths)
    return Traced(closed, (*leaves, *arrays), treedef, paths, trees[-1])


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
