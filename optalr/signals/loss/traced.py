"""The loss of one call, traced: jax's record of it as a list of equations (a jaxpr).

In: a ``Problem`` and parameters. Out: a ``Traced``, whose inputs are flat, parameter leaves first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.loss.problem import Problem, mean_over
from optalr.signals.tracing.compat import varying_axes


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function of parameters and arrays as a jaxpr of flat inputs.

    Attributes:
      closed: the ``ClosedJaxpr`` of (parameter leaves, arrays) -> flat outputs.
      inputs: the values of its inputs.
      treedef: the structure of the parameters.
      paths: the key path of each parameter leaf.
      aux_tree: the structure of the outputs after the loss (of all outputs, of a traced model).
    """

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
        loss, aux = result if split else (result, None)
        _check_scalar(loss)
        if axis_name is not None:
            loss = mean_over(loss, axis_name)
        aux_leaves, aux_tree = jax.tree.flatten(aux)
        return [loss, *aux_leaves], aux_tree

    return _trace_flat(loss_and_aux, params, problem.arrays)


def trace_predictions(predict: Callable[..., Any], params: Any, arrays: Any) -> Traced:
    """Trace a model's outputs; ``aux_tree`` is their structure.

    Args:
      predict: ``(arrays, params) -> outputs``.
      params: the parameters.
      arrays: the array arguments.
    """
    return _trace_flat(lambda p, x: jax.tree.flatten(predict(x, p)), params, arrays)


def _trace_flat(
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
