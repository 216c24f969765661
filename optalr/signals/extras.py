"""One call in place of ``jax.value_and_grad`` that returns what any method may want to know.

Everything but the value and the gradient comes in ``extras``, a dict that is passed on to
``update``. Under ``jit`` what no transformation reads is never computed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.tree_util import Partial

from optalr import arguments
from optalr.signals import curvature, taps
from optalr.signals.layers import Layers, find_layers
from optalr.signals.moments import LayerMoments
from optalr.signals.sites import Sampling, Site
from optalr.signals.taps import Recorder, Sums

_HEAD = "head"


@dataclasses.dataclass(frozen=True)
class CompositeLoss:
    """A loss given in two parts; see ``composite_loss``."""

    predict_fn: Callable[..., Any]
    output_loss: Callable[..., jax.Array]
    has_aux: bool = False

    def __call__(self, params: Any, *args: Any) -> Any:
        """Return the loss, or ``(loss, aux)``."""
        if self.has_aux:
            outputs, aux = self.predict_fn(params, *args)
            return self.output_loss(outputs, *args), aux
        return self.output_loss(self.predict_fn(params, *args), *args)


def composite_loss(
    predict_fn: Callable[..., Any], output_loss: Callable[..., jax.Array], *, has_aux: bool = False
) -> CompositeLoss:
    """Join a model and a loss of its outputs, so that Gauss-Newton products are defined.

    Choose it when a method reads ``extras["gauss_newton"]`` or ``extras["outputs"]`` (``edf``), or
    for the true Fisher; everything else works with a plain loss function as well.

    Args:
      predict_fn: ``predict_fn(params, *args) -> outputs``; with ``has_aux`` ``(outputs, aux)``,
        where aux is, for example, the new batch statistics.
      output_loss: ``output_loss(outputs, *args) -> scalar``, the mean over the batch.
      has_aux: whether ``predict_fn`` returns aux. Pass ``has_aux=True`` to
        ``value_grad_and_extras`` too.

    Returns:
      A callable loss, ``loss(params, *args)``.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = composite_loss(lambda w, x, y: x @ w, lambda z, x, y: jnp.mean((z - y) ** 2))
      >>> float(loss(jnp.zeros((2, 1)), jnp.ones((3, 2)), jnp.ones((3, 1))))
      1.0
    """
    return CompositeLoss(predict_fn, output_loss, has_aux)


def value_grad_and_extras(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    num_examples: int | None = None,
    every: int = 1,
    max_positions: int | None = None,
    axis_name: str | None = None,
) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """Return a function that evaluates a loss, its gradient, and what else methods may read.

    It replaces ``jax.value_and_grad`` in a training loop. The layers are found in the traced loss,
    so models of any framework work unchanged; ``optalr.coverage`` says what was found.

    Args:
      loss_fn: ``loss_fn(params, *args) -> scalar``, the *mean* loss over a batch; with ``has_aux``
        ``(scalar, aux)``. It is traced (once a call), so it must not branch on values. Arguments
        that are not arrays (a Python ``bool``, a string) reach it unchanged.
      has_aux: as in ``jax.value_and_grad``.
      num_examples: N, the examples in a batch, where it is not the size of the first free axis of
        a layer's input (an input laid out time first, say).
      every: measure one example in ``every``, evenly spaced from a start that varies from step to
        step; the moments stay unbiased.
      max_positions: measure at most this many positions of an example (of a convolution's output,
        of a sequence), chosen likewise.
      axis_name: inside ``jax.shard_map`` (with ``check_vma`` on), the mesh axis over which the
        batch is sharded. A loss that is local to a device is averaged over the axis; value,
        gradient and moments are those of the whole batch.

    Returns:
      ``evaluate(params, *args, signals=True)``, which returns ``(value, grads, extras)``, with aux
      ``((value, aux), grads, extras)``. ``signals`` says whether to measure: a Python bool, or a
      traced one such as ``optalr.wants_signals(opt_state)``. ``extras`` holds:

      * ``value``, ``grad``: the loss and the gradient;
      * ``value_fn``: ``params -> loss`` on the same arguments (same batch, same dropout key);
      * ``point``: the parameters;
      * ``signals``: the structure of ``params``, with a ``LayerMoments`` at each captured kernel
        and None elsewhere; its ``count`` is 0 where ``signals`` was off;
      * ``head``: the moments of the layer that is executed last, or None;
      * ``hessian``: the matvec ``v -> H v`` at ``params``;
      * ``outputs``, ``gauss_newton``: for a ``composite_loss``, its outputs and ``v -> G v``.

      The callables are ``jax.tree_util.Partial``s over arrays and may cross a ``jit`` boundary.

    Raises:
      TypeError: a parameter is not floating, the loss is not a scalar, or the result is
        differentiated again while signals are on.
      ValueError: an argument is out of range.

    Cost:
      A layer with kernel ``(m, n)``, N examples and T positions takes ``2NT(m² + n²)`` flops for
      its moments and ``4(m² + n²)`` bytes; its gradient takes ``6NTmn``. A convolution's ``m`` is
      its kernel area times its input channels, and its patches are laid out in memory; subsample
      with ``every`` and ``max_positions``. Under ``jit``, with ``signals=False`` nothing is added;
      with a traced flag that is off, only the passing of the flag.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss_fn = lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2)
      >>> evaluate = value_grad_and_extras(loss_fn)
      >>> x, y = jnp.ones((4, 3)), jnp.zeros((4, 2))
      >>> value, grads, extras = evaluate({"w": jnp.ones((3, 2))}, x, y)
      >>> extras["signals"]["w"].rows.shape, extras["signals"]["w"].cols.shape
      ((3, 3), (2, 2))

    Reference:
      Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
      curvature", 2015; Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for
      convolution layers", 2016. We share the scale so that A does not grow with T.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}.")
    arguments.check_count("every", every)
    if num_examples is not None:
        arguments.check_count("num_examples", num_examples)
    if max_positions is not None:
        arguments.check_count("max_positions", max_positions)
    sampling = Sampling(every, max_positions)

    def evaluate(params: Any, *args: Any, signals: Any = True):
        problem = _Problem.of(loss_fn, has_aux, params, args)
        traced = _trace(problem, params, axis_name)
        layers = find_layers(traced.closed, traced.leaf_shapes)
        flag = _static_flag(signals)
        flat, grads, sums = _differentiate(traced, layers, flag, sampling)
        value, *aux_leaves = flat
        moments, head = _moments(traced, layers, sums, flag, num_examples)
        grads = jax.tree.unflatten(traced.treedef, grads)
        extras = {
            "value": value,
            "grad": grads,
            "value_fn": problem.value_fn(axis_name),
            "point": params,
            "signals": jax.tree.unflatten(traced.treedef, moments),
            "head": head,
        }
        extras.update(problem.products(params, extras["value_fn"]))
        if not has_aux:
            return value, grads, extras
        return (value, jax.tree.unflatten(traced.aux_tree, aux_leaves)), grads, extras

    return evaluate


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A function with its arguments split into arrays, given later, and the rest, kept here.

    Equal bindings compare equal, so a ``Partial`` of one crosses ``jit`` without a retrace.
    """

    function: Callable[..., Any]
    treedef: Any
    kept: tuple[Any, ...]

    def args(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        remaining = iter(arrays)
        leaves = [next(remaining) if kept is _ARRAY else kept for kept in self.kept]
        return jax.tree.unflatten(self.treedef, leaves)

    def __call__(self, arrays: Sequence[Any], *first: Any) -> Any:
        return self.function(*first, *self.args(arrays))


class _Array:
    """Marks the place of an array among the kept arguments."""

    def __repr__(self) -> str:
        return "<array>"


_ARRAY = _Array()


@dataclasses.dataclass(frozen=True)
class _First:
    """A function that keeps the first of two results."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)[0]


@dataclasses.dataclass(frozen=True)
class _Averaged:
    """A loss averaged over a mesh axis if it varies over it."""

    function: Callable[..., Any]
    axis_name: str

    def __call__(self, *args: Any) -> Any:
        return _mean_over(self.function(*args), self.axis_name)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A loss and the arguments of one call."""

    loss_fn: Callable[..., Any]
    has_aux: bool | None  # None: whatever the loss returns
    bound: _Bound
    arrays: tuple[Any, ...]

    @classmethod
    def of(
        cls, loss_fn: Callable[..., Any], has_aux: bool | None, params: Any, args: Any
    ) -> "_Problem":
        """Check the parameters and split the arguments."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            dtype = jnp.result_type(leaf) if _is_number(leaf) else type(leaf)
            if not _is_number(leaf) or not jnp.issubdtype(dtype, jnp.floating):
                name = jax.tree_util.keystr(path) or "params"
                raise TypeError(
                    f"params must be a pytree of floating arrays, but {name} is {dtype}. Keep what "
                    "is not trained (counters, keys, functions) out of params and pass it as a "
                    "further argument of loss_fn."
                )
        leaves, treedef = jax.tree.flatten(args)
        is_array = [_is_array(leaf) for leaf in leaves]
        kept = tuple(
            _ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        )
        arrays = tuple(leaf for leaf, array in zip(leaves, is_array, strict=True) if array)
        return cls(loss_fn, has_aux, _Bound(loss_fn, treedef, kept), arrays)

    def value_fn(self, axis_name: str | None) -> Partial:
        """Return ``params -> loss`` on this call's arguments."""
        function = _First(self.bound) if self.has_aux else self.bound
        if axis_name is not None:
            function = _Averaged(function, axis_name)
        return Partial(function, self.arrays)

    def products(self, params: Any, value_fn: Partial) -> dict[str, Any]:
        """Return the curvature products, and the outputs of a composite loss."""
        found: dict[str, Any] = {"hessian": curvature.hessian_product(value_fn, params)}
        if not isinstance(self.loss_fn, CompositeLoss):
            return found
        loss = self.loss_fn
        predict: Callable[..., Any] = dataclasses.replace(self.bound, function=loss.predict_fn)
        if loss.has_aux:
            predict = _First(predict)
        predict = Partial(predict, self.arrays)
        output_loss = Partial(
            dataclasses.replace(self.bound, function=loss.output_loss), self.arrays
        )
        found["outputs"] = predict(params)
        found["gauss_newton"] = curvature.gauss_newton_product(predict, output_loss, params)
        return found


@dataclasses.dataclass(frozen=True)
class _Traced:
    """The loss of one call as a jaxpr of flat inputs (parameter leaves, arrays)."""

    closed: Any
    inputs: tuple[Any, ...]
    treedef: Any
    paths: tuple[str, ...]
    aux_tree: Any

    @property
    def num_leaves(self) -> int:
        return len(self.paths)

    @property
    def leaves(self) -> tuple[Any, ...]:
        return self.inputs[: self.num_leaves]

    @property
    def leaf_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(jnp.shape(leaf) for leaf in self.leaves)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_number(leaf: Any) -> bool:
    return _is_array(leaf) or isinstance(leaf, float | int | complex)


def _trace(problem: _Problem, params: Any, axis_name: str | None) -> _Traced:
    """Trace the loss once, with parameter leaves and array arguments as flat inputs."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = tuple(leaf for _, leaf in with_paths)
    aux_trees: list[Any] = []

    def flat_loss(leaves, arrays):
        result = problem.bound(arrays, jax.tree.unflatten(treedef, leaves))
        if problem.has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError("loss_fn must return (loss, aux) when has_aux=True.")
        split = isinstance(result, tuple) if problem.has_aux is None else problem.has_aux
        loss, aux = result if split else (result, None)
        _check_scalar(loss)
        if axis_name is not None:
            loss = _mean_over(loss, axis_name)
        aux_leaves, aux_tree = jax.tree.flatten(aux)
        aux_trees.append(aux_tree)
        return [loss, *aux_leaves]

    closed = jax.make_jaxpr(flat_loss)(leaves, problem.arrays)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in with_paths)
    return _Traced(closed, (*leaves, *problem.arrays), treedef, paths, aux_trees[-1])


def _check_scalar(loss: Any) -> None:
    if isinstance(loss, tuple):
        raise TypeError(
            "loss_fn must return a scalar, got a tuple. If its second entry is auxiliary, pass "
            "has_aux=True to value_grad_and_extras."
        )
    shape = getattr(loss, "shape", () if isinstance(loss, float) else None)
    if shape != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        what = f"shape {shape}" if shape is not None else repr(type(loss))
        raise TypeError(
            f"loss_fn must return a floating scalar, the mean loss over the batch, got {what}. "
            "Take jnp.mean over the examples' losses."
        )


def _mean_over(loss: Any, axis_name: str) -> Any:
    """Average a loss over a mesh axis if it differs between the axis's devices."""
    varying = getattr(jax.typeof(loss), "vma", frozenset())
    return jax.lax.pmean(loss, axis_name) if axis_name in varying else loss


def _static_flag(signals: Any) -> Any:
    """Return a Python bool where the flag can be looked at, else the traced scalar."""
    if isinstance(signals, jax.core.Tracer):
        if signals.shape != () or signals.dtype != jnp.bool_:
            raise TypeError(
                f"signals must be a boolean scalar, got {signals.dtype}{list(signals.shape)}. "
                "Pass optalr.wants_signals(opt_state)."
            )
        return signals
    if np.ndim(signals) != 0 or np.asarray(signals).dtype != np.bool_:
        raise TypeError(
            f"signals must be a boolean scalar, got {signals!r}. Pass True, False or "
            "optalr.wants_signals(opt_state)."
        )
    return bool(signals)


def _differentiate(
    traced: _Traced, layers: Layers, flag: Any, sampling: Sampling
) -> tuple[list[Any], list[Any], dict[Any, Sums]]:
    """Return the flat outputs, the gradient's leaves, and the measured sums of each slot."""
    arrays = traced.inputs[traced.num_leaves :]
    slots = _slots(traced, layers)

    def loss(leaves, slots):
        if flag is False or not slots:
            outputs = jex_core.jaxpr_as_fun(traced.closed)(*leaves, *arrays)
        else:
            traced_flag = None if flag is True else flag
            recorder = Recorder(slots, _slot_chooser(layers), traced_flag, sampling)
            outputs = taps.run(traced.closed, layers, [*leaves, *arrays], recorder)
        return outputs[0], outputs

    if flag is False or not slots:
        (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(list(traced.leaves), slots)
        return outputs, grads, slots
    (_, outputs), (grads, sums) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        list(traced.leaves), slots
    )
    return outputs, grads, sums


def _head_apart(layers: Layers) -> bool:
    """Whether the head's leaf is used by other sites too, so that it needs a slot of its own."""
    head = layers.head
    if head is None or head.view.scanned:
        return False
    return sum(site.leaf == head.leaf for site in layers.sites) > 1


def _slot_chooser(layers: Layers) -> Callable[[Site], Any]:
    apart = _head_apart(layers)
    return lambda site: _HEAD if apart and site is layers.head else site.leaf


def _slots(traced: _Traced, layers: Layers) -> dict[Any, Sums]:
    """Return the dummies, zero, of every captured leaf."""
    slots: dict[Any, Sums] = {}
    choose = _slot_chooser(layers)
    for site in layers.sites:
        leaf = traced.leaves[site.leaf]
        dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
        slots.setdefault(choose(site), taps.zero_sums(site, jnp.shape(leaf), dtype))
    return slots


def _moments(
    traced: _Traced,
    layers: Layers,
    sums: dict[Any, Sums],
    flag: Any,
    num_examples: int | None,
) -> tuple[list[LayerMoments | None], LayerMoments | None]:
    """Turn sums into moments, one entry a leaf, and those of the head."""
    first: dict[int, Site] = {}
    for site in layers.sites:
        first.setdefault(site.leaf, site)
    moments: list[LayerMoments | None] = [None] * traced.num_leaves
    head = None
    for leaf, site in first.items():
        total = sums.get(leaf)
        if layers.head is not None and layers.head.leaf == leaf and _HEAD in sums:
            own = sums[_HEAD]
            total = own if total is None else jax.tree.map(jnp.add, total, own)
        bias = traced.paths[layers.biases[leaf]] if leaf in layers.biases else None
        assert total is not None
        moments[leaf] = _normalize(site, total, flag, num_examples, bias)
    if layers.head is not None:
        head = moments[layers.head.leaf]
        if _HEAD in sums and head is not None:
            head = _normalize(layers.head, sums[_HEAD], flag, num_examples, head.bias)
    return moments, head


def _normalize(
    site: Site, sums: Sums, flag: Any, num_examples: int | None, bias: str | None
) -> LayerMoments:
    """Divide sums by what they count."""
    dtype = sums.total.dtype
    examples = jnp.asarray(_examples(site, num_examples), dtype)
    total = jnp.maximum(sums.total, 1)
    inputs = sums.inputs / total[..., None, None]
    mean = sums.mean / total[..., None]
    outputs = sums.outputs * examples
    count = jnp.where(flag, examples, 0).astype(dtype)
    positions = jnp.where(flag, jnp.ravel(sums.total)[0] / examples, 0).astype(dtype)
    if site.leaf_view.input_side == "rows":
        return LayerMoments(inputs, outputs, mean, None, count, positions, bias)
    return LayerMoments(outputs, inputs, None, mean, count, positions, bias)


def _examples(site: Site, num_examples: int | None) -> Any:
    """Return N over all devices that hold a part of the batch."""
    if num_examples is not None:
        return num_examples
    data = site.equation.invars[1 - site.kernel].aval
    examples: Any = site.num_examples
    for axis in sorted(getattr(data, "vma", None) or ()):
        examples = examples * jax.lax.psum(1, axis)
    return examples
