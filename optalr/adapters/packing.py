"""Extras through a loop that hands gradients alone to the optimizer.

``pack_extras`` puts gradients and extras into one pytree, where the loop has its gradients.
``unpack_extras`` wraps the transformation, and takes both apart when the loop calls ``update``.
"""

from typing import Any

import jax
import optax

from optalr.transforms.shared.making import taking_extras


@jax.tree_util.register_pytree_with_keys_class
class PackedExtras:
    """Gradients and the extras that came with them; ``pack_extras`` makes one.

    It is a pytree: what is mapped over it reaches extras as well as gradients.

    Attributes:
      grads: gradients, a pytree like the parameters.
      extras: arrays and functions by the names of the extras.
    """

    def __init__(self, grads: Any, extras: Any):
        self.grads, self.extras = grads, extras

    def __contains__(self, name: Any) -> bool:
        """Return False: Flax asks gradients for a collection that float8 layers overwrite."""
        del name
        return False

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """Return both parts, as jax asks for them."""
        key = jax.tree_util.GetAttrKey
        return ((key("grads"), self.grads), (key("extras"), self.extras)), None

    @classmethod
    def tree_unflatten(cls, _: None, parts: Any) -> "PackedExtras":
        """Make one of both parts, as jax asks for it."""
        return cls(*parts)


def pack_extras(grads: Any, extras: dict[str, Any]) -> PackedExtras:
    """Return gradients and extras as one pytree, to be handed on in the place of gradients.

    Choose it with ``unpack_extras`` for a training state or a trainer that calls ``tx.update(grads,
    state, params)`` and can't be told of more: Flax's own ``TrainState``, for one. What looks into
    the gradients on the way (a mean over devices, a norm for the log) must do so before.

    Args:
      grads: gradients, a pytree like the parameters.
      extras: what ``value_grad_and_extras`` returned besides, and entries of one's own.

    Returns:
      A pytree that a transformation from ``unpack_extras`` takes as gradients.

    Cost: none.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> from flax.training.train_state import TrainState
      >>> loss_fn = lambda params: jnp.sum(params["w"] ** 2)
      >>> evaluate = optalr.value_grad_and_extras(loss_fn)
      >>> tx, params = unpack_extras(optalr.learned_rate_sgd(0.1)), {"w": jnp.ones(2)}
      >>> state = TrainState.create(apply_fn=None, params=params, tx=tx)
      >>> loss, grads, extras = evaluate(state.params, signals=False)
      >>> state = state.apply_gradients(grads=pack_extras(grads, extras))
      >>> bool(loss_fn(state.params) < loss)
      True
    """
    return PackedExtras(grads, extras)


def unpack_extras(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that also takes gradients which ``pack_extras`` made.

    Choose it where the loop that calls ``update`` hands on gradients and nothing else. It stands
    outermost: around the whole chain.

    Args:
      inner: the transformation that reads extras.

    Returns:
      A transformation with the state of ``inner``. It takes gradients with extras or without, and
      extras that are handed to it in the usual way, which go before packed ones of the same name.

    Raises:
      TypeError: ``inner`` is not a gradient transformation.

    Cost: none.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> tx, w = unpack_extras(optalr.learned_rate_sgd(0.1)), jnp.ones(2)
      >>> loss, grads, extras = optalr.value_grad_and_extras(loss_fn)(w, signals=False)
      >>> updates, state = tx.update(pack_extras(grads, extras), tx.init(w), w)
      >>> bool(loss_fn(w + updates) < loss)
      True
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax.GradientTransformation, got {inner!r}.")
    inner = taking_extras(inner)

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        if isinstance(updates, PackedExtras):
            updates, extras = updates.grads, {**updates.extras, **extras}
        return inner.update(updates, state, params, **extras)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
