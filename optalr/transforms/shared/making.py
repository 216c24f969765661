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
from optalr.states import unboxed


def transformation(
    method: str,
    init: Callable[[Any], Any],
    update: Callable[..., Any],
    *,
    keeps_leaves: bool = True,
    on_auto: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that ``init`` and ``update`` make.

    Args:
      method: its name, as the user writes it.
      init: ``init(params) -> state``.
      update: ``update(updates, state, params, **extras) -> (updates, state)``.
      keeps_leaves: whether the method itself keeps arrays whose shapes follow from the parameters'.
        False also for one whose state holds that of another transformation, which looks after it.
      on_auto: whether ``update`` contracts or reshapes leaves, and calls no function of the user.
        On a mesh with explicit axes it then runs where the compiler chooses the shardings.
    """

    def init_fn(params: Any) -> Any:
        check_numbers("params", params)
        return init(as_inexact(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        check_numbers("updates", updates)
        updates, params = as_inexact(updates), as_inexact(params)
        if keeps_leaves:
            # A lambda, which jax cannot take for one that it has traced with other hyperparameters.
            _check_state(method, state, jax.eval_shape(lambda like: init(like), updates))
        if not on_auto:
            return update(updates, state, params, **extras)
        return on_auto_axes(
            lambda *args: update(*args, **extras), updates, state, params, like=(updates, state)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_state(method: str, state: Any, like: Any) -> None:
    """Raise unless a state has the arrays of ``like``, the state of these parameters and options.

    Raises:
      ValueError: an array is missing, of another shape, or one too many.
    """
    found, wanted = _shapes(state), _shapes(like)
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{method}: state{name} has {_described(found.get(name))}, and these parameters "
                f"and options need {_described(wanted.get(name))}. The state was made for others. "
                "Pass the options that it was made with, start anew by state = tx.init(params), or "
                "load an older state by optalr.upgrade_state(saved, tx.init(params))."
            )


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(unboxed(state))
    return {jax.tree_util.keystr(path): tuple(jnp.shape(leaf)) for path, leaf in leaves}


def _described(shape: tuple[int, ...] | None) -> str:
    return "no array" if shape is None else f"the shape {shape}"
