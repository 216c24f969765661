"""Tapping by hand a layer that the tracer cannot understand.

In: what a user declares inside a loss by ``tap_layer``, which leaves a mark in the traced loss.
Out: the site that the tracer makes of the mark.

The mark is an inner ``jit`` with a name of ours: it passes through ``vmap``, ``scan`` and remat,
and needs no primitive of our own, whose rules would have to follow jax's releases.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from optalr.signals.tracing.pieces import check_scales
from optalr.signals.tracing.site import Operands, Product, Sampling, Signals, Site, features, sample
from optalr.signals.tracing.views import (
    Atom,
    Dims,
    NotALayer,
    Seen,
    View,
    identity_view,
    matrix_view,
)
from optalr.signals.tracing.walk import Spot, Walk

# The name of the inner jit by which the tracer knows a hand tap; the kernel's input side follows.
MARK = "optalr_tap_layer_"


# Two functions, because jax names a jit after its function. ``checkpoint_name`` gives the body an
# equation, so that the call is never one that only hands its argument on, which jax may remove.
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

    Choose it if ``optalr.coverage`` reports a fallback for a kernel that does have a layer: one
    inside a ``custom_vjp`` (a fused or quantized product), a kernel that is masked or standardized
    before its product, a layer computed without a product. It is the identity on ``outputs``. Only
    ``value_grad_and_extras`` and ``coverage`` see it, and for this kernel they then measure what is
    declared here and nothing else:

        A = (1/NT) Σ α αᵀ over ``inputs``,    B = (1/N) Σ β βᵀ over the cotangents of ``outputs``.

    Args:
      outputs: ``(N, ..., n)``, before the bias or after it. Go on with what is returned instead.
      inputs: ``(N, ..., m)``, with the same leading axes: the layer's α. For a convolution the
        patches, in the order of the kernel's axes.
      kernel: the parameter leaf itself, as it stands in ``params``, or a transpose or reshape of
        it. Its leading axes must hold m entries and the others n, or the other way round.
      input_side: ``"rows"`` if the leading axes of ``kernel`` are the input's, ``"cols"`` if the
        trailing ones are. None decides by the sizes, and takes rows if m = n.

    Returns:
      ``outputs``.

    Raises:
      ValueError: the shapes do not fit together; the message says which.

    Cost:
      Nothing by itself. While signals are captured it costs what any layer of these sizes costs.

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
      The call is ours; the factors are those of ``value_grad_and_extras``.
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


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HandSite(Site):
    """A layer that the user declared.

    The equation's inputs are outputs ``(N, ..., n, 1)``, inputs ``(N, ..., m, 1)`` and the kernel.
    Its product is the identity on the outputs.

    Attributes:
      split: how many of the kernel's axes come before the split between its two sides.
    """

    split: int
    by_hand: ClassVar[bool] = True

    def operands(self, values: Sequence[Any]) -> tuple[Any, Any]:
        """Return inputs and outputs."""
        # What is differentiated is the outputs, so they take the kernel's place.
        return values[1], values[0]

    def product(self):
        """Return the identity on the outputs."""
        return lambda data, outputs: outputs

    def pull_back(self, data, kernel, cotangent):
        """Return nothing for the inputs, which do not enter the value, and the cotangent."""
        return jnp.zeros_like(data), cotangent

    def output_view(self) -> View:
        """Return the output as a view; its last dimension is one that ``tap_layer`` added."""
        shape = self.equation.outvars[0].aval.shape
        lead = [(Atom(-1 - axis, 1, size),) for axis, size in enumerate(shape[:-2])]
        outputs = tuple(atom for dim in self._sides[1] for atom in dim)
        return identity_view(self, shape).with_dims([*lead, outputs, ()])

    @property
    def _sides(self) -> tuple[Dims, Dims]:
        """The kernel's dimensions on the input's side and on the output's."""
        first, last = self.view.dims[: self.split], self.view.dims[self.split :]
        return (first, last) if _input_is_rows(self.equation) else (last, first)

    def extent(self) -> tuple[int, int]:
        """Return the declared inputs' first axis, and the other leading ones."""
        lead = self.equation.invars[1].aval.shape[:-2]
        return (lead[0], math.prod(lead[1:])) if lead else (1, 1)

    def example_axes(self) -> tuple[int, int] | None:
        """Return the first axis of both, if there are leading ones."""
        return (0, 0) if self.equation.invars[1].aval.ndim > 2 else None

    def signals(self, operands: Operands, take: tuple[Sampling, jax.Array]) -> Signals:
        """Lay out what was declared, one row a leading position."""
        inputs, outputs = self._sides
        lead = operands.data.ndim - 2
        data = features(operands.data, lead, inputs)
        cotangent = features(operands.cotangent, lead, outputs)
        # Of the operands at hand, which may be some of the examples.
        examples = operands.data.shape[0] if lead else 1
        data = data.reshape(1, examples, -1, data.shape[-1])
        cotangent = cotangent.reshape(1, examples, -1, cotangent.shape[-1])
        return sample(data, cotangent, take)


def take_hand_tap(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Take a layer that the user declared."""
    # The mark's inputs are outputs, inputs and kernel, in this order.
    view = seen[2]
    if not isinstance(view, View) or not view.is_parameter or view.cut is not None:
        walk.findings.note(view, "tapped by hand, but not as a whole leaf")
        return [seen[0]]
    shape = walk.findings.leaf_shapes[view.source]
    try:
        check_scales(view)
        site = _hand_site(Product(spot.jaxpr, spot.equation, 2, view, shape))
    except NotALayer as reason:
        walk.findings.note(view, str(reason))
        return [seen[0]]
    (site,) = walk.tap(spot, [site])
    return [site.output_view()]


def _hand_site(product: Product) -> Site:
    """Return the site of a marked equation.

    Raises:
      NotALayer: the kernel, as the mark sees it, is none of the leaf's matrices.
    """
    view = product.view
    outputs, inputs = (var.aval.shape for var in product.equation.invars[:2])
    m, n = inputs[-2], outputs[-2]
    rows = _input_is_rows(product.equation)
    split = split_axis(view.shape, *((m, n) if rows else (n, m)))
    if split is None:
        raise NotALayer("tapped by hand under a vmap over the kernel")
    first = [atom for dim in view.dims[:split] for atom in dim]
    last = [atom for dim in view.dims[split:] for atom in dim]
    ins, outs = (first, last) if rows else (last, first)
    return HandSite(
        origin=product,
        leaf_view=matrix_view(product.leaf_shape, view, stack=(), inputs=ins, outputs=outs),
        num_examples=inputs[0] if len(inputs) > 2 else 1,
        split=split,
    )


def split_axis(shape: tuple[int, ...], first: int, last: int) -> int | None:
    """Return k such that ``shape[:k]`` holds ``first`` entries and ``shape[k:]`` ``last``."""
    for k in range(len(shape) + 1):
        if math.prod(shape[:k]) == first and math.prod(shape[k:]) == last:
            return k
    return None


def _input_is_rows(equation: Any) -> bool:
    """Return whether a mark says that the kernel's leading axes are the input's."""
    return equation.params["name"].endswith("rows")
