"""A whole data set as one batch, in chunks: gradients and curvature products are sums over them.

    ∇L = Σ_c (n_c/N) ∇L_c        G v = Σ_c (n_c/N) J_cᵀ H_c J_c v

for a loss that is a mean over examples, with ``n_c`` of the ``N`` in chunk ``c``
("Exponentially decaying flows for optimization in deep learning", eq. 31).

In: a loss and all data. Out: what ``value_grad_and_extras`` returns of them, without signals.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from optalr.arguments import check_choice, check_count
from optalr.arrays import wide_dtype
from optalr.signals.binding.bound import Bound, bind
from optalr.signals.binding.neighbours import Tolerant
from optalr.signals.composite import CompositeLoss
from optalr.signals.curvature import in_dtypes_of
from optalr.signals.loss import Problem


def curvature_products(
    loss_fn: Callable[..., Any], params: Any, *args: Any, has_aux: bool = False
) -> dict[str, Any]:
    """Return the products with the Hessian and, for a ``composite_loss``, with Gauss-Newton.

    Choose it to take the curvature from other data than the gradient, above all from a subsample of
    the batch: an eighth of the examples makes a product eight times cheaper.
    ``extras |= curvature_products(loss, params, x[:32], y[:32])``.

    Args:
      loss_fn: ``loss_fn(params, *args) -> scalar``, with ``has_aux`` ``(scalar, aux)``; the mean
        over the examples, so that a subsample's curvature estimates the batch's without a factor.
      params: the point, a pytree of floating arrays.
      *args: the data.
      has_aux: whether ``loss_fn`` returns aux, which is dropped; a ``composite_loss`` with
        ``has_aux`` says so itself.

    Returns:
      A dict of ``jax.tree_util.Partial``s ``v -> A v`` under ``"hessian"`` and
      ``"gauss_newton"``, to be merged into ``extras``.

    Raises:
      TypeError: a parameter is not floating.

    Cost: nothing until a product is called, and then about two gradients on these data.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> curvature_products(loss, jnp.ones(2), x[:1])["hessian"](jnp.ones(2)).tolist()
      [2.0, 0.0]
    """
    # Said twice is fine: a composite loss knows of its aux, a plain function does not.
    has_aux = has_aux or getattr(loss_fn, "has_aux", False)
    problem = Problem.of(loss_fn, params, args, has_aux=has_aux).settled(params)
    products = problem.products(params, problem.value_fn(None))
    return {name: products[name] for name in ("hessian", "gauss_newton") if name in products}


def full_batch(
    loss_fn: Callable[..., Any],
    *,
    chunk_size: int,
    loop: str = "scan",
    batch_argnums: tuple[int, ...] | None = None,
) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """Return ``evaluate`` for a data set that is one batch but does not fit in memory as one.

    Choose it in place of ``optalr.value_grad_and_extras`` for full-batch fits with ``edf``; it has
    the same call and the same extras, but no signals: a method that reads ``extras["signals"]``
    raises an error that names them. Memory is that of one chunk.

    Args:
      loss_fn: the *mean* loss over examples, ``loss_fn(params, *args) -> scalar``, best a
        ``composite_loss``; without aux.
      chunk_size: examples in a chunk; the last one may be smaller.
      loop: ``"scan"``, inside ``jit``; ``"unroll"``, inside ``jit`` with one copy of the program
        a chunk (on a CPU convolution gradients are some 20 times slower inside a scan);
        ``"python"``, outside ``jit``, for data that only fits in the host's memory: the arguments
        may be NumPy arrays, each chunk is sent to the device when its turn comes, and ``update`` is
        called without ``jit``.
      batch_argnums: which of ``args``, counted from 0, have the examples along their first axis;
        None for all.

    Returns:
      ``evaluate(params, *args, signals=False) -> (value, grads, extras)``, with ``value``,
      ``grad``, ``value_fn``, ``point``, ``hessian`` and, for a ``composite_loss``,
      ``gauss_newton``. ``signals`` is accepted, so that a loop written for
      ``value_grad_and_extras`` runs unchanged, and ignored. Sums are taken in float32 or wider;
      gradients and products are then cast to the parameters' dtypes, the value is not.

    Raises:
      ValueError: an argument is out of range, the first axes of the data differ, or there are no
        examples.

    Cost: one forward pass more for each product than with ``value_grad_and_extras``, because the
      intermediates of a chunk are not kept.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> x = jnp.arange(10.0).reshape(5, 2)
      >>> value, grads, extras = full_batch(loss, chunk_size=2)(jnp.ones(2), x)
      >>> bool(jnp.isclose(value, loss(jnp.ones(2), x)))
      True

    Reference: "Exponentially decaying flows for optimization in deep learning", eq. 31.
    """
    check_count("chunk_size", chunk_size)
    check_choice("loop", loop, ("scan", "unroll", "python"))
    if getattr(loss_fn, "has_aux", False):
        raise ValueError(
            "loss_fn must not return aux for full_batch: there is no one aux of all chunks. Pass "
            "a loss without it, with batch statistics fixed."
        )
    chunks = _Chunks(chunk_size, loop, None if batch_argnums is None else tuple(batch_argnums))

    def evaluate(params: Any, *args: Any, signals: Any = False) -> tuple[Any, Any, dict[str, Any]]:
        del signals  # moments of layers are not summed over chunks
        bound, arrays = Problem.of(loss_fn, params, args, has_aux=False).settled(params).halves
        value, grads = chunks.mean(_value_and_grad, _On.of(bound, arrays), params)
        grads = in_dtypes_of(params, grads)
        extras = {
            "value": value,
            "grad": grads,
            "value_fn": Partial(Tolerant(_ChunkedMean(chunks, _value, bound)), arrays),
            "point": params,
            "hessian": Partial(_ChunkedProduct(chunks, _hessian, bound), arrays, params),
        }
        if isinstance(loss_fn, CompositeLoss):
            product = _ChunkedProduct(chunks, _gauss_newton, bound)
            extras["gauss_newton"] = Partial(product, arrays, params)
        return value, grads, extras

    return evaluate


class _On(NamedTuple):
    """A loss and the data it is to be taken on, all of them or one chunk; see ``bind``."""

    loss_fn: Callable[..., Any]
    args: tuple[Any, ...]
    apart: bool

    @classmethod
    def of(cls, bound: Bound, arrays: Any) -> "_On":
        return cls(*bound.opened(arrays), bound.closure is not None)


_Term = Callable[..., Any]  # what is averaged over chunks, ``term(on, *operands)``


@dataclasses.dataclass(frozen=True)
class _ChunkedMean:
    """A mean over chunks as a function of ``(arrays, *operands)``; equal ones compare equal."""

    chunks: "_Chunks"
    term: _Term
    bound: Bound

    def __call__(self, arrays: Any, *operands: Any) -> Any:
        return self.chunks.mean(self.term, _On.of(self.bound, arrays), *operands)


class _ChunkedProduct(_ChunkedMean):
    """A mean over chunks of products, in the dtypes of the parameters."""

    def __call__(self, arrays: Any, *operands: Any) -> Any:
        return in_dtypes_of(operands[0], super().__call__(arrays, *operands))


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How a data set is cut, and means over the pieces.

    Attributes:
      size: examples in a chunk; the last one may have fewer.
      loop: how the chunks are gone through, as in ``full_batch``.
      batch_argnums: which arguments hold examples; None for all.
    """

    size: int
    loop: str
    batch_argnums: tuple[int, ...] | None

    def mean(self, term: _Term, on: _On, *operands: Any) -> Any:
        """Return ``Σ_c (n_c/N) term(chunk_c, *operands)``, in float32 or wider."""
        if self.loop == "scan":
            return _add_up(self._scanned(term, on, *operands))
        return _add_up(self._one_by_one(term, on, *operands))

    def _scanned(self, term: _Term, on: _On, *operands: Any) -> Iterator[Any]:
        """Yield the sum over all whole chunks, taken by a scan, and the rest."""
        total = self._num_examples(on.args)
        whole = total // self.size
        if whole:

            def body(carry: Any, i: jax.Array) -> tuple[Any, None]:
                new = term(self._chunk(on, i * self.size, self.size), *operands)
                return jax.tree.map(jnp.add, carry, _weighted(new, self.size / total)), None

            like = jax.eval_shape(lambda: term(self._chunk(on, 0, self.size), *operands))
            # A carry keeps its dtype. In half precision, late chunks would be lost in a large sum.
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide_dtype(x.dtype)), like)
            yield jax.lax.scan(body, zeros, jnp.arange(whole))[0]
        if rest := total - whole * self.size:
            last = term(self._chunk(on, whole * self.size, rest), *operands)
            yield _weighted(last, rest / total)

    def _one_by_one(self, term: _Term, on: _On, *operands: Any) -> Iterator[Any]:
        """Yield the weighted term of each chunk."""
        total = self._num_examples(on.args)
        for start in range(0, total, self.size):
            chunk = self._chunk(on, start, count := min(self.size, total - start))
            if self.loop == "unroll":
                part = term(chunk, *operands)
            else:
                # One compilation serves all chunks of one size: the loss is static, the data not.
                halves = bind(chunk.loss_fn, chunk.args, apart=chunk.apart)
                part = _compiled_term(term, *halves, *operands)
            yield _weighted(part, count / total)

    def _is_batch(self, i: int) -> bool:
        return self.batch_argnums is None or i in self.batch_argnums

    def _num_examples(self, args: tuple[Any, ...]) -> int:
        if wrong := [i for i in self.batch_argnums or () if not 0 <= i < len(args)]:
            raise ValueError(
                f"batch_argnums={self.batch_argnums} names {wrong}, but evaluate got {len(args)} "
                "arguments after params. Count them from 0, params not included."
            )
        # Weights and flags may stand among the arguments; only the examples must agree in number.
        batch = [arg for i, arg in enumerate(args) if self._is_batch(i)]
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(
                "the data of full_batch must share their first axis, the examples; found first "
                f"axes {sorted(sizes)}. Name the arguments that hold examples in batch_argnums."
            )
        if sizes == {(0,)}:
            raise ValueError(
                "the data of full_batch hold no examples: the first axis of the arguments in "
                f"batch_argnums={self.batch_argnums} has length 0. Pass at least one example."
            )
        return sizes.pop()[0]

    def _chunk(self, on: _On, start: Any, count: int) -> _On:
        """Return the loss on ``count`` examples from ``start`` on."""

        def cut(leaf: Any) -> Any:
            # A plain slice leaves NumPy arrays on the host, where a traced start needs jax's.
            if isinstance(start, int):
                return leaf[start : start + count]
            return jax.lax.dynamic_slice_in_dim(leaf, start, count)

        args = (jax.tree.map(cut, x) if self._is_batch(i) else x for i, x in enumerate(on.args))
        return on._replace(args=tuple(args))


def _add_up(parts: Iterator[Any]) -> Any:
    total = next(parts)
    for part in parts:
        total = jax.tree.map(jnp.add, total, part)
    return total


def _weighted(tree: Any, weight: float) -> Any:
    # By n_c/N, so that a smaller last chunk counts for what it holds.
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(x.dtype)) * weight, tree)


def _value(on: _On, params: Any) -> Any:
    return on.loss_fn(params, *on.args)


def _value_and_grad(on: _On, params: Any) -> Any:
    return jax.value_and_grad(on.loss_fn)(params, *on.args)


def _hessian(on: _On, params: Any, v: Any) -> Any:
    return curvature_products(on.loss_fn, params, *on.args)["hessian"](v)


def _gauss_newton(on: _On, params: Any, v: Any) -> Any:
    return curvature_products(on.loss_fn, params, *on.args)["gauss_newton"](v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled_term(term: _Term, bound: Bound, arrays: Any, *operands: Any) -> Any:
    return term(_On.of(bound, arrays), *operands)
