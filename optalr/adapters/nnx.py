"""For Flax nnx: an evaluation that takes a module, and an optimizer that passes extras on."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from optalr.reading.metrics import metrics
from optalr.reading.wanted import wants_signals
from optalr.signals import extras as core


def value_grad_and_extras(
    loss_fn: Callable[..., Any], *, wrt: Any = nnx.Param, has_aux: bool = False, **options: Any
) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """Return ``optalr.value_grad_and_extras`` of a loss that takes an nnx module.

    Choose it instead of ``nnx.value_and_grad``. What the forward pass changes in the module (batch
    statistics, random counts) is written back to it, once per call. The loss probes of
    ``extras["value_fn"]`` start from the same statistics and keys and change nothing in the module.

    Args:
      loss_fn: ``loss_fn(model, *args) -> scalar``; with ``has_aux`` ``(scalar, aux)``.
      wrt: the variables that are trained, as for ``nnx.Optimizer``.
      has_aux: as in ``jax.value_and_grad``.
      **options: of ``optalr.value_grad_and_extras``.

    Returns:
      ``evaluate(model, *args, signals=True)``, which returns ``(value, grads, extras)``, with aux
      ``((value, aux), grads, extras)``, for ``update(model, grads, **extras)`` of
      ``optalr.adapters.nnx.Optimizer``, or of ``nnx.Optimizer``. ``grads`` are variables, as
      ``nnx.value_and_grad`` returns them.

    Raises:
      TypeError: as ``optalr.value_grad_and_extras``.

    Cost: that of ``optalr.value_grad_and_extras``. The loss is traced at each call, so put the call
      into ``nnx.jit``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> evaluate = value_grad_and_extras(lambda model, x: jnp.mean(model(x) ** 2))
      >>> loss, grads, extras = evaluate(model, jnp.ones((4, 3)))
      >>> grads["kernel"].shape, "signals" in extras
      ((3, 2), True)

      ``Optimizer`` has an example of a whole step.
    """

    def evaluate(model: Any, *args: Any, signals: Any = True, **more: Any) -> Any:
        graphdef, params, rest = nnx.split(model, wrt, ...)

        def pure_loss(params: Any, rest: Any, *args: Any) -> Any:
            merged = nnx.merge(graphdef, params, rest)
            outcome = loss_fn(merged, *args)
            value, aux = outcome if has_aux else (outcome, None)
            return value, (aux, nnx.as_pure(nnx.split(merged, wrt, ...)[2]))

        pure = core.value_grad_and_extras(pure_loss, has_aux=True, **options)
        (value, (aux, changed)), grads, extras = pure(
            nnx.as_pure(params), nnx.as_pure(rest), *args, signals=signals, **more
        )
        nnx.update(model, changed)
        # A stock nnx optimizer selects gradients by the type of their variables.
        grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))
        return ((value, aux) if has_aux else value), grads, extras

    return evaluate


class Optimizer(nnx.Optimizer):
    """``nnx.Optimizer`` for transformations that read extras, with its metrics as a property.

    Choose it instead of ``nnx.Optimizer`` to ask it for ``wants_signals`` and ``metrics``.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> from flax import nnx
      >>> model, x, y = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 3)), jnp.zeros((4, 2))
      >>> loss_fn = lambda model, x, y: jnp.mean((model(x) - y) ** 2)

      >>> evaluate = value_grad_and_extras(loss_fn)
      >>> optimizer = Optimizer(model, optalr.tso_alra(1e-2), wrt=nnx.Param)
      >>> loss, grads, extras = evaluate(model, x, y, signals=optimizer.wants_signals)
      >>> _ = optimizer.update(model, grads, **extras)
      >>> bool(loss_fn(model, x, y) < loss)
      True
    """

    @property
    def wants_signals(self) -> jax.Array | np.bool_:
        """Whether the next ``update`` will read signals."""
        return wants_signals(nnx.as_pure(self.opt_state))

    @property
    def metrics(self) -> dict[str, Any]:
        """What ``optalr.metrics`` finds in the state."""
        return metrics(nnx.as_pure(self.opt_state))

    def update(self, model: Any, grads: Any, /, **extras: Any) -> Any:
        """Update the model in place.

        Args:
          model: the module that the optimizer was made for.
          grads: gradients, as ``value_grad_and_extras`` returned them.
          **extras: the extras that came with them, and others such as ``validation_value``.
        """
        params = nnx.state(model, self.wrt)
        # nnx selects gradients by the type of their variables, and those of a user may be bare.
        typed = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))
        return super().update(model, typed, **extras)
