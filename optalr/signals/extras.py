"""One call in place of ``jax.value_and_grad`` that returns what any method may want to know.

In: a loss. Out: a function of parameters and data that returns the value, the gradient and
``extras``, a dict that is passed on to ``update``. Under ``jit`` what no transformation reads is
never computed.

A call goes through what stands beside this file: the loss is traced (``loss``), its layers are
found (``tracing``) and tapped while it is differentiated (``tapping``), and what was measured
becomes moments. Curvature products (``curvature``) need no layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.tree_util import Partial

from optalr import arguments
from optalr.sharding.spread import spread_of_batch
from optalr.signals.binding.examples import refusal
from optalr.signals.loss import pose
from optalr.signals.moments import FactorStorage
from optalr.signals.tapping.assembly import Assembly
from optalr.signals.tapping.budget import Budget
from optalr.signals.tapping.capture import Tapped, layers_of
from optalr.signals.tapping.fisher import true_fisher
from optalr.signals.tapping.gauge import Dummies
from optalr.signals.tapping.outer import outer_entry, with_outer_products
from optalr.signals.tracing.site import Sampling
from optalr.signals.tracing.walk import Layers

Params = TypeVar("Params")
Args = ParamSpec("Args")
Value = TypeVar("Value", covariant=True)


class Evaluate(Protocol[Params, Args, Value]):
    """The function that ``value_grad_and_extras`` returns, as type checkers see it.

    It has the loss's signature and returns what the loss returns. Besides the loss's arguments a
    ``ParamSpec`` admits no others, so a call with ``signals`` or ``key`` is a signature of its own,
    in which the loss's further arguments are not checked.
    """

    @overload
    def __call__(
        self, params: Params, /, *args: Args.args, **kwargs: Args.kwargs
    ) -> tuple[Value, Params, dict[str, Any]]: ...

    @overload
    def __call__(
        self, params: Params, /, *args: Any, signals: Any, key: Any = None, **kwargs: Any
    ) -> tuple[Value, Params, dict[str, Any]]: ...

    @overload
    def __call__(
        self, params: Params, /, *args: Any, key: Any, **kwargs: Any
    ) -> tuple[Value, Params, dict[str, Any]]: ...


def value_grad_and_extras(
    loss_fn: Callable[Concatenate[Params, Args], Value],
    *,
    has_aux: bool = False,
    num_examples: int | None = None,
    every: int | None = None,
    max_positions: int | None = None,
    max_cost: float | None = 0.25,
    axis_name: str | None = None,
    fisher: str = "empirical",
    likelihood: str | None = None,
    storage: FactorStorage | None = None,
    outer_products: bool = False,
    batch_sharding: NamedSharding | None = None,
) -> Evaluate[Params, Args, Value]:
    """Return a function that evaluates a loss, its gradient, and what else methods may read.

    Choose it in place of ``jax.value_and_grad`` in every training loop that uses a method of this
    package. The layers are found in the traced loss, so models of any framework work unchanged;
    ``optalr.coverage`` shows what was found.

    Args:
      loss_fn: ``loss_fn(params, *args) -> scalar``, the *mean* loss over a batch; with ``has_aux``
        ``(scalar, aux)``. It is traced (once a call), so it must not branch on values. Arguments
        that are not arrays (a Python ``bool``, a string) reach it unchanged.
      has_aux: as in ``jax.value_and_grad``.
      num_examples: N, the number of examples in a batch. Give it if the examples are not counted by
        the first free axis of a layer's input (because time comes first, say).
      every: measure one example in ``every`` (at least 1). They are evenly spaced, from a start
        that varies from step to step, so the moments stay unbiased. Given, or ``max_positions``, it
        decides alone; ``every=1`` measures everything.
      max_positions: measure at most this many positions of an example (of a convolution's output,
        of a sequence; at least 1), from a start that varies likewise.
      max_cost: the flops of measuring over those of the layers' gradients, > 0; None for no limit.
        A sample of each layer's examples and positions is measured that keeps to it, unbiased as
        above: at most eight samples per dimension (of 256 at least), and of the largest layers as
        many as remain. Measuring that takes less than 10⁸ flops in all is not cut.
      axis_name: inside ``jax.shard_map`` (with ``check_vma`` on), the mesh axis over which the
        batch is sharded. A loss that is local to a device is averaged over the axis. Value,
        gradient and moments are those of the whole batch.
      fisher: ``"empirical"`` measures signals of the targets in the batch, at no further cost.
        ``"true"`` measures signals of targets drawn from the model's predictions. This takes a
        ``composite_loss``, a ``key=`` at each call and a second backward pass (even if a traced
        ``signals`` is off; a Python False saves it).
      likelihood: what the outputs parametrize, with ``fisher="true"``: ``"softmax"`` (class
        scores), ``"bernoulli"`` (logits) or ``"gaussian"`` (means of unit variance). The loss is
        taken to be a mean over all axes of the outputs but the last.
      storage: the method's ``KroneckerOptions``, for layers that are summed up in the backward pass
        (used several times, in a loop or a remat, or of more examples and positions than features).
        Of sides that the method keeps as blocks or a diagonal, no more is then measured there, and
        ``signals`` hold these. ``optalr.coverage`` says which layers need it.
      outer_products: whether ``extras`` also hold gradients of dense layers as sums of outer
        products, where these are so few that a method multiplies their sides sooner than the
        gradient. For a program on one device (with ``axis_name`` there are none); ``train_step``
        decides by itself.
      batch_sharding: the ``NamedSharding`` of a batch whose examples, its first axis, are sharded
        over a mesh. Give it where the method keeps its factors in parts (``sharded_factors``). Each
        device then measures a sample of its own examples, and receives its rows of the sums alone.
        Without it each device receives whole sums, and of a sample of the examples all rows. Sides
        of more than 1152 rows need ``storage`` as well. Inside a ``shard_map``, and where the
        devices don't divide the examples, it changes nothing.

    Returns:
      ``evaluate(params, *args, signals=True, key=None)``, which returns ``(value, grads,
      extras)``, with aux ``((value, aux), grads, extras)``. Type checkers see the signature of the
      loss, whose arguments may also be given by name. ``signals`` says whether to measure: a
      Python bool, or a traced one such as ``optalr.wants_signals(opt_state)``. ``extras`` holds:

      * ``value``, ``grad``: the loss and the gradient;
      * ``value_fn``: ``params -> loss`` on the same arguments (same batch, same dropout key);
      * ``point``: the parameters;
      * ``signals``: the structure of ``params``, with a ``LayerMoments`` at each captured kernel
        and None elsewhere; its ``count`` is 0 if ``signals`` was off;
      * ``measure``: ``(keep=None) -> signals``, for a method that reads them inside a branch of its
        own, or needs part of them. Layers whose inputs and cotangents take less memory than their
        moments are measured there, and if it is not called nothing is written. ``keep`` maps key
        paths to what is wanted of rows and columns, forms of ``optalr.linalg.structured``. Of
        ``Blocks`` and ``Diagonal`` such a layer measures no more, and they come back as forms;
      * ``outer_products``: if asked for and somewhere cheaper, the structure of ``params`` with
        ``OuterProducts`` where they are (dense layers that run once, whose kernel nothing else
        reads), else None;
      * ``head``: the moments of the layer that is executed last, or None;
      * ``measure_head``: ``(keep=None) -> head``, likewise, with ``keep`` its rows' and columns';
      * ``hessian``: the matvec ``v -> H v`` at ``params``;
      * ``outputs``, ``gauss_newton``: for a ``composite_loss``, its outputs and ``v -> G v``.

      The callables are ``jax.tree_util.Partial``s over arrays and may cross a ``jit`` boundary.

    Raises:
      TypeError: ``loss_fn`` is no function, or no ``composite_loss`` with ``fisher="true"``. When
        called: a parameter is not floating, the loss is not a scalar, or the result is
        differentiated again while signals are on.
      ValueError: an argument is out of range; ``batch_sharding`` is of another mesh than that of
        ``jax.set_mesh``, or does not shard the first axis. When called: the batch is empty.

    Cost:
      A layer with kernel ``(m, n)``, N examples and T positions takes ``2NT(m² + n²)`` flops for
      its moments and ``4(m² + n²)`` bytes; its gradient takes ``6NTmn``. A convolution's ``m`` is
      its kernel area times its input channels, and its patches are laid out in memory. By default a
      sample keeps all this to a quarter of the gradients' flops. Under ``jit``, with
      ``signals=False`` nothing is added; with a traced flag that is off, only the passing of the
      flag.

    Examples:
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
    _check(loss_fn, storage, num_examples)
    spread = spread_of_batch(batch_sharding)
    sampling = checked_sampling(every, max_positions, max_cost)
    drawn = true_fisher(loss_fn, fisher, likelihood)

    def evaluate(params: Any, /, *args: Any, signals: Any = True, key: Any = None, **named: Any):
        called = functools.partial(loss_fn, **named) if named else loss_fn
        problem, traced = pose(called, params, args, has_aux=has_aux, axis_name=axis_name)
        layers = check_examples(layers_of(traced), called, args)
        tapped = Tapped(traced, layers, _static_flag(signals), sampling, storage, spread)
        if drawn is None:
            if outer_products and axis_name is None:
                tapped = with_outer_products(tapped)
            outputs, grad_leaves, slots = tapped.differentiate()
        else:
            # The gradient is that of the targets in the batch; nothing is measured on its way.
            outputs, grad_leaves, _ = dataclasses.replace(tapped, flag=False).differentiate()
            tapped = drawn.tap_model(tapped, problem)
            slots = drawn.measure(tapped, key, axis_name)
        (value, *aux_leaves), value_fn = outputs, problem.value_fn(axis_name)
        grads = jax.tree.unflatten(traced.treedef, grad_leaves)
        # Everything is put in, whoever reads it: under jit what is not read is never computed.
        extras = {"value": value, "grad": grads, "value_fn": value_fn, "point": params}
        extras |= _measured_entries(Assembly.of(tapped, num_examples), tapped.flag, slots)
        extras |= problem.products(params, value_fn) | outer_entry(tapped, slots, grad_leaves)
        found = (value, jax.tree.unflatten(traced.aux_tree, aux_leaves)) if has_aux else value
        return found, grads, extras

    # Only ``has_aux`` knows whether a pair comes first, and a type checker does not ask it.
    return evaluate  # pyright: ignore[reportReturnType]


def _check(loss_fn: Any, storage: Any, num_examples: Any) -> None:
    check_loss(loss_fn)
    check_storage("storage", storage)
    if num_examples is not None:
        arguments.check_count("num_examples", num_examples)


def check_loss(loss_fn: Any) -> None:
    """Check that the first argument is a loss."""
    if not callable(loss_fn):
        shown = arguments.shown(loss_fn)
        raise TypeError(f"loss_fn must be a function, got {shown}. It comes first.")


def check_examples(layers: Layers, loss_fn: Any, args: Any) -> Layers:
    """Check that layers see examples and positions, where not all arrays of a batch are empty."""
    if any(site.num_examples == 0 or 0 in site.extent() for site in layers.sites):
        raise refusal(loss_fn, args)
    return layers


def check_storage(name: str, storage: Any) -> None:
    """Check that an argument is None or says what a method keeps."""
    if storage is not None and not isinstance(storage, FactorStorage):
        raise TypeError(f"{name} must be the method's KroneckerOptions, got {storage!r}.")


def checked_sampling(
    every: int | None, max_positions: int | None, max_cost: float | None
) -> Sampling | Budget:
    """Check the arguments that say how much of a batch is measured, and return what they mean."""
    if max_cost is not None:
        arguments.check_interval("max_cost", max_cost, 0, open_low=True)
    if every is None and max_positions is None:
        return Sampling() if max_cost is None else Budget(max_cost)
    if every is not None:
        arguments.check_count("every", every)
    if max_positions is not None:
        arguments.check_count("max_positions", max_positions)
    return Sampling(every or 1, max_positions)


def _measured_entries(assembly: Assembly, flag: bool | jax.Array, slots: dict[int, Dummies]) -> Any:
    """Return the entries of ``extras`` that hold moments."""
    # A flag that is known while tracing is no argument of a compiled program.
    traced = None if isinstance(flag, bool) else flag
    moments, head = assembly(traced, slots), assembly.head_moments(traced, slots)
    entries = {"signals": moments, "head": head}
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(slots)):
        later = {
            "measure": Partial(assembly, traced, slots),
            "measure_head": Partial(assembly.head_moments, traced, slots),
        }
    else:
        # Outside of jit all is computed by now. An assembly is made anew at each call, so a
        # function compiled for one would be compiled again for the next.
        later = {"measure": Partial(_ready, moments), "measure_head": Partial(_ready, head)}
    return entries | later


def _ready(moments: Any, keep: Any = None) -> Any:
    """Return moments as they are, whole where they were measured whole."""
    del keep
    return moments


def _static_flag(signals: Any) -> Any:
    """Return a Python bool where the flag can be looked at, else the traced scalar."""
    # A flag known now leaves no cond in the program; a concrete array counts as known.
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
