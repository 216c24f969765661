"""What a loss must put up with from the transformations of other libraries.

optax's line searches call ``value_fn`` with all further extras whose names stand in its signature,
and raise an error where one does not.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

# The extras of ``value_grad_and_extras``, of our methods, and of optax's transformations, but for
# the three that a line search takes itself.
OTHER_EXTRAS = (
    *("signals", "measure", "head", "measure_head", "point", "hessian", "outputs", "gauss_newton"),
    *("outer_products", "activations", "target_norm", "validation_value", "validation_value_fn"),
    *("grad_fn", "loss", "loss_fn", "obj_fn"),
)


@dataclasses.dataclass(frozen=True)
class Tolerant:
    """A function that takes other extras by name, and ignores them."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **others: Any) -> Any:
        """Return the function's value on its own arguments."""
        del others
        return self.function(*args)


# A bare ``**others`` names nothing, so the names are written into the signature.
Tolerant.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in OTHER_EXTRAS
        ),
        inspect.Parameter("others", inspect.Parameter.VAR_KEYWORD),
    ]
)
