"""One call in place of ``jax.value_and_grad`` that returns what any method may want to know.

In: a loss. Out: a function of parameters and data that returns the value, the gradient and
``extras``, a dict that is passed on to ``update``. Under ``jit`` what no transformation reads is
never computed.

A call goes through the folders beside this file: the loss is traced (``loss``), its layers are
found (``tracing``) and tapped while it is differentiated (``tapping``), and what was measured
becomes moments. Curvature products (``curvature``) need no layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from optalr import arguments
from optalr.signals.loss.composite import CompositeLoss
from optalr.signals.loss.problem import Problem, predictions
from optalr.signals.loss.traced import Traced, trace, trace_predictions
from optalr.signals.tapping.assembly import Assembly
from optalr.signals.tapping.capture import Tapped
from optalr.signals.tapping.fisher import LIKELIHOODS, draw_and_measure
from optalr.signals.tapping.measuring import Dummies
from optalr.signals.tracing.layers import find_layers
from optalr.signals.tracing.plan import Layers
from optalr.signals.tracing.sampling import Sampling


def value_grad_and_extras(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    num_examples: int | None = None,
    every: int = 1,
    max_positions: int | None = None,
    axis_name: str | None = None,
    fisher: str = "empirical",
    likelihood: str | None = None,
) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
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
        that varies from step to step, so the moments stay unbiased.
      max_positions: measure at most this many positions of an example (of a convolution's output,
        of a sequence; at least 1), from a start that varies likewise. None measures all.
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

    Returns:
      ``evaluate(params, *args, signals=True, key=None)``, which returns ``(value, grads,
      extras)``, with aux ``((value, aux), grads, extras)``. ``signals`` says whether to measure: a
      Python bool, or a traced one such as ``optalr.wants_signals(opt_state)``. ``extras`` holds:

      * ``value``, ``grad``: the loss and the gradient;
      * ``value_fn``: ``params -> loss`` on the same arguments (same batch, same dropout key);
      * ``point``: the parameters;
      * ``signals``: the structure of ``params``, with a ``LayerMoments`` at each captured kernel
        and None elsewhere; its ``count`` is 0 if ``signals`` was off;
      * ``measure``: ``() -> signals``, for a method that reads them inside a branch of its own.
        With a traced flag, layers whose inputs and cotangents take less memory than their moments
        are measured there, and if it is not called nothing is written;
      * ``head``: the moments of the layer that is executed last, or None;
      * ``hessian``: the matvec ``v -> H v`` at ``params``;
      * ``outputs``, ``gauss_newton``: for a ``composite_loss``, its outputs and ``v -> G v``.

      The callables are ``jax.tree_util.Partial``s over arrays and may cross a ``jit`` boundary.

    Raises:
      TypeError: ``loss_fn`` is no function, or no ``composite_loss`` with ``fisher="true"``. When
        called: a parameter is not floating, the loss is not a scalar, or the result is
        differentiated again while signals are on.
      ValueError: an argument is out of range.

    Cost:
      A layer with kernel ``(m, n)``, N examples and T positions takes ``2NT(m² + n²)`` flops for
      its moments and ``4(m² + n²)`` bytes; its gradient takes ``6NTmn``. A convolution's ``m`` is
      its kernel area times its input channels, and its patches are laid out in memory; subsample
      with ``every`` and ``max_positions``. Under ``jit``, with ``signals=False`` nothing is added;
      with a traced flag that is off, only the passing of the flag.

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
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}.")
    arguments.check_count("every", every)
    if num_examples is not None:
        arguments.check_count("num_examples", num_examples)
    if max_positions is not None:
        arguments.check_count("max_positions", max_positions)
    _check_fisher(loss_fn, fisher, likelihood)
    capture = _capture_empirical
    if isinstance(loss_fn, CompositeLoss) and likelihood is not None:
        capture = _TrueFisher(loss_fn, likelihood, axis_name)
    sampling = Sampling(every, max_positions)

    def evaluate(params: Any, *args: Any, signals: Any = True, key: jax.Array | None = None):
        problem = Problem.of(loss_fn, params, args, has_aux=has_aux)
        traced = trace(problem, params, axis_name)
        tapped = Tapped(traced, _layers_of(traced), _static_flag(signals), sampling)
        evaluation = _Evaluation(problem, params, tapped, key)
        (value, *aux_leaves), grad_leaves, gathered = capture(evaluation)
        assembly = Assembly.of(gathered.tapped, num_examples)
        grads = jax.tree.unflatten(traced.treedef, grad_leaves)
        extras = {"value": value, "grad": grads, "value_fn": problem.value_fn(axis_name)}
        extras["point"] = params
        # Everything is put in, whoever reads it: under jit what is not read is never computed.
        extras |= _measured_entries(assembly, tapped.flag, gathered.slots)
        extras |= problem.products(params, extras["value_fn"])
        if not has_aux:
            return value, grads, extras
        return (value, jax.tree.unflatten(traced.aux_tree, aux_leaves)), grads, extras

    return evaluate


class _Evaluation(NamedTuple):
    """One call of ``evaluate``.

    Fields:
      problem: the loss and its arguments.
      params: the parameters.
      tapped: the traced loss, its layers, and what to measure.
      key: draws the targets of the true Fisher; None where none was given.
    """

    problem: Problem
    params: Any
    tapped: Tapped
    key: jax.Array | None


class _Gathered(NamedTuple):
    """What each slot gathered, and of which function."""

    tapped: Tapped
    slots: dict[int, Dummies]


# The flat outputs of the loss, the gradient's leaves, and what was gathered on the way.
_Captured = tuple[list[Any], list[Any], _Gathered]


def _capture_empirical(evaluation: _Evaluation) -> _Captured:
    """Measure the signals of the targets in the batch, on the way to the gradient."""
    outputs, grads, slots = evaluation.tapped.differentiate()
    return outputs, grads, _Gathered(evaluation.tapped, slots)


@dataclasses.dataclass(frozen=True)
class _TrueFisher:
    """Measures the signals of targets drawn from the model's predictions.

    Attributes:
      loss: the model and the loss of its outputs.
      likelihood: what the outputs parametrize.
      axis_name: the mesh axis over which the batch is sharded, or None.
    """

    loss: CompositeLoss
    likelihood: str
    axis_name: str | None

    def __call__(self, evaluation: _Evaluation) -> _Captured:
        # The gradient is that of the targets in the batch, and nothing is measured on its way.
        outputs, grads, _ = dataclasses.replace(evaluation.tapped, flag=False).differentiate()
        predict = predictions(self.loss, evaluation.problem.bound)
        traced = trace_predictions(predict, evaluation.params, evaluation.problem.arrays)
        model = dataclasses.replace(evaluation.tapped, traced=traced, layers=_layers_of(traced))
        slots = draw_and_measure(model, self.likelihood, self._local_key(evaluation.key))
        return outputs, grads, _Gathered(model, slots)

    def _local_key(self, key: jax.Array | None) -> jax.Array:
        if key is None:
            raise TypeError(
                "fisher='true' draws targets: pass evaluate(params, ..., key=jax.random.key(step))."
            )
        if self.axis_name is None:
            return key
        # Each device holds other examples, and must draw other targets for them.
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))


def _layers_of(traced: Traced) -> Layers:
    return find_layers(traced.closed, traced.leaf_shapes)


def _measured_entries(assembly: Assembly, flag: bool | jax.Array, slots: dict[int, Dummies]) -> Any:
    """Return the entries of ``extras`` that hold moments."""
    moments = assembly(flag, slots)
    # A flag known beforehand puts nothing off: whoever asks later gets what is there.
    later = (_as_they_are, moments) if isinstance(flag, bool) else (assembly, flag, slots)
    return {
        "signals": moments,
        "measure": Partial(*later),
        "head": assembly.head_moments(flag, slots),
    }


def _as_they_are(moments: Any) -> Any:
    return moments


def _check_fisher(loss_fn: Any, fisher: str, likelihood: str | None) -> None:
    arguments.check_choice("fisher", fisher, ("empirical", "true"))
    if fisher == "empirical":
        if likelihood is not None:
            raise ValueError(
                f"likelihood={likelihood!r} is used by the true Fisher only. Pass fisher='true'."
            )
        return
    if not isinstance(loss_fn, CompositeLoss):
        raise TypeError(
            "fisher='true' needs the model's outputs: give loss_fn as "
            "optalr.composite_loss(predict_fn, output_loss)."
        )
    arguments.check_choice("likelihood", likelihood, tuple(LIKELIHOODS))


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
