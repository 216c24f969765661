"""The true Fisher: signals of targets drawn from the model's own predictions.

In: a tapped model, the likelihood of its outputs, and a key. Out: what each slot gathered.

The empirical Fisher squares the gradients of the targets in the batch. The true one squares those
of targets drawn from the predictive distribution, which takes a backward pass of its own:

    y ~ p(y | f(x)),    β = ∂(−ln p(y | f)) / ∂s

For the three likelihoods here the gradient at the outputs is prediction minus sample.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from optalr import arguments
from optalr.signals.composite import CompositeLoss
from optalr.signals.loss import Problem, predictions, trace_flat
from optalr.signals.tapping.capture import Tapped, layers_of
from optalr.signals.tapping.gauge import Dummies


def _softmax(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``softmax(f) − onehot(y)`` for a class y drawn for each row of class scores."""
    classes = jax.random.categorical(key, outputs)
    return jax.nn.softmax(outputs) - jax.nn.one_hot(classes, outputs.shape[-1], dtype=outputs.dtype)


def _bernoulli(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``sigmoid(f) − y`` for independent y drawn for each logit."""
    mean = jax.nn.sigmoid(outputs)
    return mean - jax.random.bernoulli(key, mean).astype(outputs.dtype)


def _gaussian(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``f − y`` for ``y ~ N(f, I)``: minus a standard normal."""
    return -jax.random.normal(key, outputs.shape, outputs.dtype)


# By name: outputs and a key in, the gradient of −ln p(y | f) at the outputs out.
_LIKELIHOODS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = MappingProxyType(
    {"softmax": _softmax, "bernoulli": _bernoulli, "gaussian": _gaussian}
)


def true_fisher(loss_fn: Any, fisher: str, likelihood: str | None) -> "TrueFisher | None":
    """Check the two arguments that choose a Fisher matrix; return None for the empirical one."""
    arguments.check_choice("fisher", fisher, ("empirical", "true"))
    if fisher == "empirical":
        if likelihood is not None:
            raise ValueError(
                f"likelihood={likelihood!r} is used by the true Fisher only. Pass fisher='true'."
            )
        return None
    if not isinstance(loss_fn, CompositeLoss):
        raise TypeError(
            "fisher='true' needs the model's outputs: give loss_fn as "
            "optalr.composite_loss(predict_fn, output_loss)."
        )
    arguments.check_choice("likelihood", likelihood, tuple(_LIKELIHOODS))
    return TrueFisher(loss_fn, _LIKELIHOODS[str(likelihood)])


@dataclasses.dataclass(frozen=True)
class TrueFisher:
    """Measures the signals of targets drawn from the model's predictions.

    Attributes:
      loss: the model and the loss of its outputs.
      draw: the gradient of −ln p(y | f) at the outputs, for y drawn by a key.
    """

    loss: CompositeLoss
    draw: Callable[[jax.Array, jax.Array], jax.Array]

    def tap_model(self, tapped: Tapped, problem: Problem) -> Tapped:
        """Return the model of a tapped loss, from parameters to outputs, tapped likewise."""
        predict = predictions(self.loss, problem.bound)
        params = jax.tree.unflatten(tapped.traced.treedef, tapped.traced.leaves)
        traced = trace_flat(
            lambda p, arrays: jax.tree.flatten(predict(arrays, p)), params, problem.arrays
        )
        traced = dataclasses.replace(traced, num_held=tapped.traced.num_held)
        layers = layers_of(traced, num_outputs=None)
        return dataclasses.replace(tapped, traced=traced, layers=layers)

    def measure(
        self, model: Tapped, key: jax.Array | None, axis_name: str | None
    ) -> dict[int, Dummies]:
        """Return what each slot gathered of the signals of sampled targets.

        A loss is taken to be the mean over all axes of the outputs but the last, and a sum over the
        last (classes, or components of the target).

        Args:
          model: the model, from parameters to outputs.
          key: draws the targets.
          axis_name: the mesh axis over which the batch is sharded, or None.
        """
        if key is None:
            raise TypeError(
                "fisher='true' draws targets: pass evaluate(params, ..., key=jax.random.key(step))."
            )
        if axis_name is not None:
            # Each device holds other examples, and must draw other targets for them.
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        slots = model.zero_slots()
        if model.is_off:
            return slots
        # With the leaves held fixed the pull-back computes no gradient: only the slots are filled.
        outputs, pull_back = jax.vjp(lambda slots: model(model.traced.leaves, slots), slots)
        # Outputs of several heads are independent given the model: each draws with its own key.
        keys = jax.random.split(key, len(outputs))
        cotangents = [
            self.draw(output, key) / _num_predictions(output)
            for output, key in zip(outputs, keys, strict=True)
        ]
        (sums,) = pull_back(cotangents)
        return sums


def _num_predictions(output: jax.Array) -> int:
    # The gradient of a mean over this many rows. A vector of outputs is a row an entry: there is no
    # last axis left to sum over.
    return output.size // output.shape[-1] if output.ndim > 1 else max(output.size, 1)
