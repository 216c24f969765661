"""Making a transformation of two functions, with what every method does before its own work.

Leaves become arrays of floating point. What is no number is refused at ``init``. A state that was
made for other parameters or options is refused where ``update`` is traced, and not by an operation
deep inside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_numbers
from optalr.arrays import as_inexact, on_auto_axes
from optalr.states import check_state, is_named_tuple, unboxed


def transformation(
    method: str,
    init: Callable[[Any], Any],
    update: Callable[..., Any],
    *,
    holds: type | None = None,
    on_auto: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that ``init`` and ``update`` make.

    Args:
      method: its name, as the user writes it.
      init: ``init(params) -> state``.
      update: ``update(updates, state, params, **extras) -> (updates, state)``.
      holds: the type of the state of a method that keeps no arrays whose shapes follow from the
        parameters', or whose state holds that of another transformation, which looks after it. None
        for all others: their states are compared with what ``init`` returns.
      on_auto: whether ``update`` contracts or reshapes leaves, and calls no function of the user.
        On a mesh with explicit axes it then runs where the compiler chooses the shardings.
    """

    def init_fn(params: Any) -> Any:
        check_numbers("params", params)
        return init(as_inexact(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        check_numbers("updates", updates)
        check_numbers("params", params)
        updates, params = as_inexact(updates), as_inexact(params)
        if holds is None:
            # A lambda, which jax cannot take for one that it has traced with other hyperparameters.
            like = jax.eval_shape(lambda like: init(like), updates)
            check_state(method, state, isinstance(state, type(like)))
            _check_shapes(method, state, like)
        else:
            check_state(method, state, isinstance(state, holds))
        if not on_auto:
            return update(updates, state, params, **extras)
        return on_auto_axes(
            lambda *args: update(*args, **extras), updates, state, params, like=(updates, state)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def chained(
    method: str, *links: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Return the chain of a recipe's links, which refuses by name what is no state of it.

    Each link looks at its own part. ``optax.chain`` itself would hand the letters of a dictionary's
    keys to them, where gradients and state are exchanged.
    """
    return judging(method, optax.chain(*links), lambda state: _is_chain(state, len(links)))


def taking_extras(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Return a transformation whose ``update`` takes extras, whatever it does with them.

    ``optax.MultiSteps`` takes them and is none of optax's types that do, so
    ``optax.with_extra_args_support`` alone would drop them.
    """
    if isinstance(inner, optax.MultiSteps):
        update: Any = inner.update
        return optax.GradientTransformationExtraArgs(inner.init, update)
    return optax.with_extra_args_support(inner)


def judging(
    method: str, inner: optax.GradientTransformation, fits: Callable[[Any], bool]
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation of optax's that refuses what is no state of it.

    Args:
      method: its name, as the user writes it.
      inner: the transformation.
      fits: whether a value is of the kind of its states.
    """
    inner = taking_extras(inner)

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        check_state(method, state, fits(state))
        return inner.update(updates, state, params, **extras)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _is_chain(state: Any, length: int) -> bool:
    # A list is what some checkpoints make of a tuple.
    is_plain = isinstance(state, tuple | list) and not is_named_tuple(state)
    return is_plain and len(state) == length


def _check_shapes(method: str, state: Any, like: Any) -> None:
    """Raise unless a state has the arrays of ``like``, the state of these parameters and options.

    Raises:
      ValueError: an array is missing, of another shape, or one too many.
    """
    found, wanted = _shapes(state), _shapes(like)
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{method}: state{name} has {_described(found.get(name))}, and these parameters "
                f"and options need {_described(wanted.get(name))}. Pass those that the state was "
                "made with, or start anew by tx.init(params). An older release's state: "
                "optalr.upgrade_state(saved, tx.init(params))."
            )


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(unboxed(state))
    return {jax.tree_util.keystr(path): tuple(jnp.shape(leaf)) for path, leaf in leaves}


def _described(shape: tuple[int, ...] | None) -> str:
    return "no array" if shape is None else f"the shape {shape}"
