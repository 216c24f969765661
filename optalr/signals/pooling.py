"""Max pooling whose derivative keeps no buffer of its input's size for every product.

XLA's CPU backend turns the transpose of a max pooling into a scatter onto zeros. The zeros of all
products along one linearization are one constant, copied for each of them at the start, so memory
grows with their number. Written as a sum over the window's offsets,

    y = max_o x[s·i + o],   dy = Σ_o [o is the first offset where x[s·i + o] = y] dx[s·i + o],

the derivative is slices and selections, the transpose pads and additions, and nothing is kept but
one bit an offset and output, which all products share.

In: a function of arrays. Out: the same function, whose poolings have this derivative
(``with_light_pooling``); values stay as they are.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.tracing.jaxprs import is_closed, replay

# Larger windows (global pooling) have small outputs: unrolling them would cost more than it saves.
_MAX_OFFSETS = 16


def with_light_pooling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function of arrays with another derivative of its max poolings.

    It finds poolings outside and inside ``jit``, with windows of at most 16 entries. Those in
    loops, branches, ``jax.checkpoint`` and functions with a derivative of their own stay.
    """

    def pooled(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)

        def flat(*leaves: Any) -> Any:
            return function(*jax.tree.unflatten(treedef, leaves))

        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        # Without a pooling the function is called as it is, so that its trace has nothing of ours.
        if not any(_holds_pooling(equation) for equation in closed.jaxpr.eqns):
            return function(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), _evaluate(closed, leaves))

    return pooled


def _evaluate(closed: Any, inputs: Any) -> list[Any]:
    """Evaluate a jaxpr, its poolings with the light derivative."""
    replacements = {
        index: functools.partial(_replacement, equation)
        for index, equation in enumerate(closed.jaxpr.eqns)
        if _holds_pooling(equation)
    }
    return replay(closed, inputs, replacements)


def _replacement(equation: Any, inputs: list[Any]) -> list[Any]:
    params = equation.params
    if equation.primitive.name != "reduce_window_max":
        return _evaluate(params["jaxpr"], inputs)
    window = PoolingWindow(params["window_dimensions"], params["window_strides"], params["padding"])
    return [light_max_pool(window, inputs[0])]


def _holds_pooling(equation: Any) -> bool:
    """Return whether an equation is, or calls under ``jit``, a pooling that is to be replaced."""
    if equation.primitive.name == "reduce_window_max":
        # Integers have no derivative, and no pooling of Flax, Equinox or Haiku is dilated.
        few = math.prod(equation.params["window_dimensions"]) <= _MAX_OFFSETS
        floating = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
        dilations = {*equation.params["base_dilation"], *equation.params["window_dilation"]}
        return few and floating and dilations <= {1}
    inner = equation.params.get("jaxpr")
    return (
        equation.primitive.name in ("jit", "pjit")
        and is_closed(inner)
        and any(_holds_pooling(each) for each in inner.jaxpr.eqns)
    )


@dataclasses.dataclass(frozen=True)
class PoolingWindow:
    """Where a pooling looks, as ``jax.lax.reduce_window`` takes it.

    Attributes:
      sizes: the window's size along each axis.
      strides: how far it moves.
      padding: how much is padded before and after each axis.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def slices(self, x: jax.Array, fill: float, shape: tuple[int, ...]) -> list[jax.Array]:
        """Return, for each offset in a window, the entries of all windows there."""
        padded = jax.lax.pad(x, jnp.asarray(fill, x.dtype), [(*both, 0) for both in self.padding])
        spans = [s * (n - 1) + 1 for s, n in zip(self.strides, shape, strict=True)]

        def at(offset: tuple[int, ...]) -> jax.Array:
            stop = [o + span for o, span in zip(offset, spans, strict=True)]
            return jax.lax.slice(padded, offset, stop, self.strides)

        return [at(offset) for offset in itertools.product(*map(range, self.sizes))]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def light_max_pool(window: PoolingWindow, x: jax.Array) -> jax.Array:
    """Return the largest entry of each window."""
    sizes, strides, padding = dataclasses.astuple(window)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, sizes, strides, padding)


@light_max_pool.defjvp
def _light_max_pool_jvp(window: PoolingWindow, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    y = light_max_pool(window, x)
    # Equal entries share no derivative: the first one takes it all, as in XLA's transpose.
    taken = jnp.zeros(y.shape, bool)
    dy = jnp.zeros(y.shape, dx.dtype)
    for entry, move in zip(
        window.slices(x, -jnp.inf, y.shape), window.slices(dx, 0, y.shape), strict=True
    ):
        first = (entry == y) & ~taken
        taken = taken | first
        dy = dy + jnp.where(first, move, 0)
    return y, dy
