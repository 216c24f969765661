"""One call in place of ``jax.value_and_grad`` that returns what any method may want to know.

Everything but the value and the gradient comes in ``extras``, a dict that is passed on to
``update``. Under ``jit`` what no transformation reads is never computed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from optalr import arguments
from optalr.signals.problem import CompositeLoss, Problem, trace
from optalr.signals.tapping import fisher as true_fisher
from optalr.signals.tapping.assembly import Assembly
from optalr.signals.tapping.capture import differentiate
from optalr.signals.tracing.layers import find_layers
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
      fisher: ``"empirical"``, signals of the targets in the batch, at no further cost; or
        ``"true"``, signals of targets drawn from the model's predictions, which takes a
        ``composite_loss``, a ``key=`` at each call and a second backward pass (also where a traced
        ``signals`` is off; a Python False saves it).
      likelihood: with ``fisher="true"``, what the outputs parametrize: ``"softmax"`` (class
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
        and None elsewhere; its ``count`` is 0 where ``signals`` was off;
      * ``measure``: ``() -> signals``, for whoever looks at them inside a branch of their own:
        with a traced flag, layers whose inputs and cotangents take less memory than their moments
        are measured there, and where it is not called nothing is written;
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
    sampling = Sampling(every, max_positions)

    def evaluate(params: Any, *args: Any, signals: Any = True, key: jax.Array | None = None):
        problem = Problem.of(loss_fn, has_aux, params, args)
        traced = trace(problem, params, axis_name)
        flag = _static_flag(signals)
        layers = find_layers(traced.closed, traced.leaf_shapes)
        if likelihood is None:
            flat, grads, measured = differentiate(traced, layers, flag, sampling)
            assembly = Assembly.of(traced, layers, sampling, num_examples)
        else:
            flat, grads, _ = differentiate(traced, layers, False, sampling)
            predictions, layers, measured = true_fisher.sampled_sums(
                problem, params, likelihood, _sampling_key(key, axis_name), flag, sampling
            )
            assembly = Assembly.of(predictions, layers, sampling, num_examples)
        moments = assembly(flag, measured)
        value, *aux_leaves = flat
        grads = jax.tree.unflatten(traced.treedef, grads)
        extras = {
            "value": value,
            "grad": grads,
            "value_fn": problem.value_fn(axis_name),
            "point": params,
            "signals": moments,
            "measure": _later(assembly, flag, measured, moments),
            "head": assembly.head_moments(flag, measured),
        }
        extras.update(problem.products(params, extras["value_fn"]))
        if not has_aux:
            return value, grads, extras
        return (value, jax.tree.unflatten(traced.aux_tree, aux_leaves)), grads, extras

    return evaluate


def _later(assembly: Assembly, flag: Any, measured: Any, moments: Any) -> Partial:
    """Return a function that gives the moments where it is called."""
    if isinstance(flag, bool):
        return Partial(_as_they_are, moments)
    return Partial(assembly, flag, measured)


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
    arguments.check_choice("likelihood", likelihood, tuple(true_fisher.LIKELIHOODS))


def _sampling_key(key: jax.Array | None, axis_name: str | None) -> jax.Array:
    if key is None:
        raise TypeError(
            "fisher='true' draws targets: pass evaluate(params, ..., key=jax.random.key(step))."
        )
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


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
