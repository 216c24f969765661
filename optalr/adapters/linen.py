"""A Flax linen ``TrainState`` that passes extras to the optimizer."""

from typing import Any

import jax
import numpy as np
from flax.training import train_state

from optalr.reading.wanted import wants_signals


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` with an ``apply_gradients`` that also takes ``extras``.

    Choose it instead of ``flax.training.train_state.TrainState`` where the optimizer reads more
    than the gradient. Subclass it for further fields, such as batch statistics.

    Examples:
      >>> import jax, jax.numpy as jnp, optalr
      >>> from flax import linen as nn
      >>> model, x, y = nn.Dense(2), jnp.ones((4, 3)), jnp.zeros((4, 2))
      >>> params = model.init(jax.random.key(0), x)
      >>> loss_fn = lambda params, x, y: jnp.mean((model.apply(params, x) - y) ** 2)

      >>> evaluate = optalr.value_grad_and_extras(loss_fn)
      >>> tx = optalr.tso_alra(1e-2)
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> loss, grads, extras = evaluate(state.params, x, y, signals=state.wants_signals)
      >>> state = state.apply_gradients(grads=grads, extras=extras)
      >>> bool(loss_fn(state.params, x, y) < loss)
      True
    """

    @property
    def wants_signals(self) -> jax.Array | np.bool_:
        """Whether the next ``apply_gradients`` will read signals."""
        return wants_signals(self.opt_state)

    def apply_gradients(
        self, *, grads: Any, extras: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Return the state after one update.

        Args:
          grads: gradients with the structure of ``params``.
          extras: keyword arguments for ``tx.update``, as ``value_grad_and_extras`` returns them,
            and others such as ``validation_value``.
          **kwargs: fields to replace, as in Flax.

        Returns:
          A new ``TrainState``.
        """

        def update(updates: Any, opt_state: Any, params: Any = None) -> Any:
            return self.tx.update(updates, opt_state, params, **(extras or {}))

        # Flax's own method runs with this update in place of its own, so that it goes on treating
        # overwritten collections in its way.
        bound = self.tx._replace(update=update)
        stepped = train_state.TrainState.apply_gradients(
            self.replace(tx=bound), grads=grads, **kwargs
        )
        return stepped.replace(tx=self.tx)
