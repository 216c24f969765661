"""The compiled parts of training: one step, an epoch of them in a scan, an evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optalr
from optalr.experiments.data.dataset import Dataset, Split
from optalr.experiments.models import Model
from optalr.experiments.training.devices import Placement
from optalr.experiments.training.objective import Objective

# A probe runs in every step, an evaluation once per epoch: so a probe reads fewer examples.
EVALUATION_BATCH = 512
PROBE_BATCH = 256
# Not logged: the loop counts steps and measures the loss itself, and a state's size is constant.
_NOT_LOGGED = ("step", "state_bytes", "loss")


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
      params: the model's parameters.
      model_state: its other collections (batch statistics); may be empty.
      opt_state: the method's state.
      step: int32 scalar, steps taken.
    """

    params: Any
    model_state: Any
    opt_state: Any
    step: jax.Array


# Arrays, traced or not; while compiling, their shapes and dtypes.
_Arrays = Any


class Batch(NamedTuple):
    """What one step reads.

    Attributes:
      x: examples, one per row.
      y: their targets.
      validation_value: float32 scalar, the validation loss if it was just measured, else NaN.
    """

    x: _Arrays
    y: _Arrays
    validation_value: _Arrays


class Batches(NamedTuple):
    """What an epoch reads.

    Attributes:
      x: all training examples.
      y: all their targets.
      indices: int32 ``(steps, batch)``, the examples of each step.
      validation_values: float32 ``(steps,)``, as in ``Batch``.
    """

    x: _Arrays
    y: _Arrays
    indices: _Arrays
    validation_values: _Arrays


Measured = dict[str, jax.Array]
Step = Callable[[TrainState, jax.Array, Batch], tuple[TrainState, Measured]]


def make_loss(model: Model, objective: Objective, dataset: Dataset) -> Any:
    """Return ``loss(params, x, y, model_state, key) -> (loss, (outputs, model_state))``."""

    def predict(params, x, y, model_state, key):
        outputs, new_state = model.apply(params, model_state, dataset.prepare(x), key=key)
        return outputs, (outputs, new_state)

    def output_loss(outputs, x, y, model_state, key):
        return objective.loss(outputs, y)

    return optalr.composite_loss(predict, output_loss, has_aux=True)


def make_step(
    loss_fn: Any,
    tx: optax.GradientTransformationExtraArgs,
    objective: Objective,
    *,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    validation: Split | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
    **capture: Any,
) -> Step:
    """Return ``step(state, key, batch) -> (state, measured)``.

    ``key`` is the run's. The step's own key follows from it and from the step's number, so that a
    resumed run draws what an uninterrupted one would have drawn.

    Args:
      loss_fn: as ``make_loss`` returns it.
      tx: the method.
      objective: names and computes the score that is measured beside the loss.
      augment: changes the examples at random.
      validation: lets methods probe the loss of a random batch of these examples, as the extra
        ``validation_value_fn``.
      sharding: of the batch, where several devices share it.
      **capture: options of ``value_grad_and_extras``.
    """
    evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=True, **capture)

    def step(state: TrainState, key: jax.Array, batch: Batch) -> tuple[TrainState, Measured]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        if sharding is not None:
            batch = _shared(batch, sharding)
        x = batch.x if augment is None else augment(augment_key, batch.x)
        (loss, (outputs, model_state)), grads, extras = evaluate(
            state.params,
            x,
            batch.y,
            state.model_state,
            dropout_key,
            signals=optalr.wants_signals(state.opt_state),
        )
        if validation is not None and len(validation):
            extras["validation_value_fn"] = _probe(loss_fn, validation, state, key=dropout_key)
        extras["validation_value"] = batch.validation_value
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extras)
        params = optax.apply_updates(state.params, updates)
        measured = {"loss": loss, objective.score_name: objective.score(outputs, batch.y)}
        measured |= _reported(opt_state)
        measured = {name: jnp.asarray(v, jnp.float32) for name, v in measured.items()}
        return TrainState(params, model_state, opt_state, state.step + 1), measured

    return step


def _shared(batch: Batch, sharding: jax.sharding.NamedSharding) -> Batch:
    """Return the batch with its examples cut over devices."""
    x, y = jax.lax.with_sharding_constraint((batch.x, batch.y), sharding)
    return batch._replace(x=x, y=y)


def _probe(loss_fn: Any, validation: Split, state: TrainState, *, key: jax.Array) -> Any:
    """Return the loss of a random validation batch, as a function of the parameters."""
    size = min(PROBE_BATCH, len(validation))
    # By the step's own key, so that a resumed run probes the same batches.
    chosen = jax.random.choice(key, len(validation), (size,), replace=False)
    batch = jnp.asarray(validation.x)[chosen], jnp.asarray(validation.y)[chosen]

    def value(args, params):
        return loss_fn(params, *args)[0]

    return jax.tree_util.Partial(value, (*batch, state.model_state, key))


def _reported(opt_state: Any) -> Measured:
    found = optalr.metrics(opt_state)
    return {name: value for name, value in found.items() if name not in _NOT_LOGGED}


def make_epoch(
    step: Step,
) -> Callable[[TrainState, jax.Array, Batches], tuple[TrainState, Measured]]:
    """Return ``epoch(state, key, batches) -> (state, measured)``: a scan of ``step``.

    What is measured comes back with a leading axis of steps.
    """

    def epoch(state, key, batches):
        def body(state, inputs):
            chosen, validation_value = inputs
            batch = Batch(batches.x[chosen], batches.y[chosen], validation_value)
            return step(state, key, batch)

        return jax.lax.scan(body, state, (batches.indices, batches.validation_values))

    return epoch


def make_evaluation(
    model: Model, objective: Objective, dataset: Dataset, *, place: Placement
) -> Callable[[Any, Any, Split], dict[str, float]]:
    """Return ``evaluation(params, model_state, split)``: the mean loss and score of a split.

    Devices of a mesh share its examples as they share those of a step.
    """

    @functools.partial(jax.jit, out_shardings=place.everywhere)
    def sums(variables, part, weight):
        (params, model_state), (x, y) = variables, part
        outputs, _ = model.apply(params, model_state, dataset.prepare(x))
        losses = objective.example_losses(outputs, y)
        scores = objective.example_scores(outputs, y)
        return jnp.sum(losses * weight), jnp.sum(scores * weight)

    # One shape for every split, so one compilation.
    size = min(EVALUATION_BATCH, max(map(len, (dataset.train, dataset.validation, dataset.test))))
    size = place.rounded(size)

    def evaluation(params, model_state, split):
        if not len(split):
            return {"loss": float("nan"), objective.score_name: float("nan")}
        totals = []
        for start in range(0, len(split), size):
            indices = np.arange(start, start + size)
            # The last part is filled up with copies of its last example, which have weight 0.
            part = place.examples(split, np.minimum(indices, len(split) - 1))
            weight = place.shared((indices < len(split)).astype(np.float32))
            totals.append(sums((params, model_state), part, weight))
        loss, score = np.sum(np.asarray(jax.device_get(totals), np.float64), axis=0) / len(split)
        return {"loss": float(loss), objective.score_name: float(score)}

    return evaluation
