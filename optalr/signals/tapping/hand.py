"""Tapping by hand a layer that the tracer cannot understand."""

import math

import jax
from jax.ad_checkpoint import checkpoint_name

# The name of the inner jit by which the tracer knows a hand tap; the kernel's input side follows.
MARK = "optalr_tap_layer_"


def _mark_rows(outputs, inputs, kernel):
    del inputs, kernel
    return checkpoint_name(outputs, "optalr_tap_layer")


def _mark_cols(outputs, inputs, kernel):
    del inputs, kernel
    return checkpoint_name(outputs, "optalr_tap_layer")


_mark_rows.__name__ = _mark_rows.__qualname__ = MARK + "rows"
_mark_cols.__name__ = _mark_cols.__qualname__ = MARK + "cols"
_MARKS = {"rows": jax.jit(_mark_rows), "cols": jax.jit(_mark_cols)}


def tap_layer(
    outputs: jax.Array,
    inputs: jax.Array,
    kernel: jax.Array,
    *,
    input_side: str | None = None,
) -> jax.Array:
    """Declare, inside a loss, that ``outputs`` come from ``inputs`` through ``kernel``.

    Choose it where ``optalr.coverage`` reports a fallback for a kernel that does have a layer: one
    inside a ``custom_vjp`` (a fused or quantized product), a kernel that is sliced, masked or
    normalized before its product, a layer computed without a product. It is the identity on
    ``outputs``; only ``value_grad_and_extras`` and ``coverage`` see it, and for this kernel they
    then measure what is declared here and nothing else:

        A = (1/NT) Σ α αᵀ over ``inputs``,    B = (1/N) Σ β βᵀ over the cotangents of ``outputs``.

    Args:
      outputs: ``(N, ..., n)``, before the bias or after it. Use what is returned in its place.
      inputs: ``(N, ..., m)``, with the same leading axes: the layer's α. For a convolution the
        patches, in the order of the kernel's axes.
      kernel: the parameter leaf itself, as it stands in ``params`` (a transpose or reshape of it
        will do). Its leading axes must hold m entries and the others n, or the other way round.
      input_side: ``"rows"`` if the leading axes of ``kernel`` are the input's, ``"cols"`` if the
        trailing ones are. By default what the sizes say, and rows where m = n.

    Returns:
      ``outputs``.

    Raises:
      ValueError: the shapes do not fit together; the message says which.

    Cost:
      Nothing by itself; while signals are captured, what any layer of these sizes costs.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import optalr
      >>> def loss_fn(params, x):
      ...     s = x @ (params["w"] / jnp.linalg.norm(params["w"]))
      ...     s = optalr.tap_layer(s, x, params["w"])
      ...     return jnp.mean(s**2)
      >>> optalr.coverage(loss_fn, {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))).treatment
      {"['w']": 'kronecker'}

    Reference:
      The escape hatch is ours; the factors are those of ``value_grad_and_extras``.
    """
    for name, array in (("outputs", outputs), ("inputs", inputs)):
        if getattr(array, "ndim", 0) < 1:
            raise ValueError(f"tap_layer: {name} must be an array (N, ..., features).")
    if outputs.shape[:-1] != inputs.shape[:-1]:
        raise ValueError(
            "tap_layer: outputs and inputs must agree in all axes but the last, got "
            f"{outputs.shape} and {inputs.shape}."
        )
    m, n = inputs.shape[-1], outputs.shape[-1]
    fits = [
        side
        for side, first, last in (("rows", m, n), ("cols", n, m))
        if split_axis(kernel.shape, first, last) is not None
    ]
    if input_side is not None and input_side not in _MARKS:
        raise ValueError(f"tap_layer: input_side must be 'rows' or 'cols', got {input_side!r}.")
    if not fits or input_side not in (None, *fits):
        where = "" if input_side is None else f" with input_side={input_side!r}"
        raise ValueError(
            f"tap_layer: a kernel of shape {kernel.shape} has no split of its axes into {m} input "
            f"and {n} output features{where}. Pass the parameter leaf itself."
        )
    # A new trailing axis: under vmap a reshape puts the batch axis first, wherever it stood.
    outputs = jax.lax.reshape(outputs, (*outputs.shape, 1))
    inputs = jax.lax.reshape(inputs, (*inputs.shape, 1))
    marked = _MARKS[input_side or fits[0]](outputs, inputs, kernel)
    return jax.lax.reshape(marked, marked.shape[:-1])


def split_axis(shape: tuple[int, ...], first: int, last: int) -> int | None:
    """Return k such that ``shape[:k]`` holds ``first`` entries and ``shape[k:]`` ``last``."""
    for k in range(len(shape) + 1):
        if math.prod(shape[:k]) == first and math.prod(shape[k:]) == last:
            return k
    return None
