"""What methods keep of Gram matrices, told to whoever asks before anything is measured.

A chain of transformations hides what it is made of. But each of them makes its part of the state,
and says then what it keeps.
"""

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from optalr.signals.moments import FactorStorage
from optalr.states import children, is_named_tuple

_HEARD: contextvars.ContextVar[list[FactorStorage] | None] = contextvars.ContextVar(
    "heard", default=None
)


def tell(storage: FactorStorage) -> None:
    """Say what a method keeps, while it makes its state."""
    heard = _HEARD.get()
    if heard is not None:
        heard.append(storage)


def storage_of(init: Callable[[Any], Any], params: Any) -> FactorStorage | None:
    """Return what all methods keep that read signals; None if they differ or one doesn't say.

    Args:
      init: what makes the state of a chain. It is traced, and nothing is computed.
      params: the parameters, or their shapes.
    """
    heard: list[FactorStorage] = []
    token = _HEARD.set(heard)
    try:
        # A function of its own: jax remembers what it has traced, and would not call init again.
        state = jax.eval_shape(lambda params: init(params), params)
    finally:
        _HEARD.reset(token)
    # Options that say more than what is kept may differ, and need not be hashable.
    names = [field.name for field in dataclasses.fields(FactorStorage)]
    found = {FactorStorage(**{name: getattr(each, name) for name in names}) for each in heard}
    silent = _num_readers(state) - len(heard)
    return found.pop() if len(found) == 1 and not silent else None


def _num_readers(node: Any) -> int:
    """Return how many states under ``node`` are of methods that read signals."""
    own = is_named_tuple(node) and hasattr(node, "wants_signals")
    return own + sum(_num_readers(child) for _, child in children(node))
