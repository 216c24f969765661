"""The compiled parts of training: one step, an epoch of them in a scan, an evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optalr
from optalr.experiments.data.dataset import Dataset, Split
from optalr.experiments.models import Model
from optalr.experiments.training.objective import Problem

EVALUATION_BATCH = 512
PROBE_BATCH = 256
# The loop counts its own steps, and the bytes of a state do not change.
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


def make_loss(model: Model, problem: Problem, dataset: Dataset) -> Any:
    """Return ``loss(params, x, y, model_state, key) -> (loss, (outputs, model_state))``."""

    def predict(params, x, y, model_state, key):
        outputs, new_state = model.apply(params, model_state, dataset.prepare(x), key=key)
        return outputs, (outputs, new_state)

    def output_loss(outputs, x, y, model_state, key):
        return problem.loss(outputs, y)

    return optalr.composite_loss(predict, output_loss, has_aux=True)


def make_step(
    loss_fn: Any,
    tx: optax.GradientTransformationExtraArgs,
    problem: Problem,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    validation: Split | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Return ``step(state, key, x, y, validation_value) -> (state, measured)``.

    ``key`` is the run's; the step's own follows from it and the step's number, so that a resumed
    run draws what the first would have drawn. Where there are ``validation`` examples, methods may
    probe the loss of a random batch of them, the extra ``validation_value_fn``.
    """
    evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=True)

    def probe(validation, state, key):
        """Return the loss of a random validation batch, as a function of the parameters."""
        size = min(PROBE_BATCH, len(validation))
        chosen = jax.random.choice(key, len(validation), (size,), replace=False)
        batch = jnp.asarray(validation.x)[chosen], jnp.asarray(validation.y)[chosen]

        def value(args, params):
            return loss_fn(params, *args)[0]

        return jax.tree_util.Partial(value, (*batch, state.model_state, key))

    def step(state, key, x, y, validation_value):
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        if augment is not None:
            x = augment(augment_key, x)
        (loss, (outputs, model_state)), grads, extras = evaluate(
            state.params,
            x,
            y,
            state.model_state,
            dropout_key,
            signals=optalr.wants_signals(state.opt_state),
        )
        if validation is not None and len(validation):
            extras["validation_value_fn"] = probe(validation, state, dropout_key)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, **extras, validation_value=validation_value
        )
        params = optax.apply_updates(state.params, updates)
        measured = {"loss": loss, problem.score_name: problem.score(outputs, y)}
        reported = optalr.metrics(opt_state)
        measured |= {name: reported[name] for name in reported if name not in _NOT_LOGGED}
        measured = {name: jnp.asarray(v, jnp.float32) for name, v in measured.items()}
        return TrainState(params, model_state, opt_state, state.step + 1), measured

    return step


def make_epoch(step: Callable[..., Any]) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Return ``epoch(state, key, x, y, indices, validation_values)``: a scan of ``step``.

    ``indices`` is ``(steps, batch)``; what is measured comes back with a leading axis of steps.
    """

    def epoch(state, key, x, y, indices, validation_values):
        def body(state, inputs):
            chosen, validation_value = inputs
            return step(state, key, x[chosen], y[chosen], validation_value)

        return jax.lax.scan(body, state, (indices, validation_values))

    return epoch


def make_evaluation(
    model: Model, problem: Problem, dataset: Dataset
) -> Callable[[Any, Any, Split], dict[str, float]]:
    """Return ``evaluation(params, model_state, split)``: the mean loss and score of a split."""

    @jax.jit
    def sums(params, model_state, x, y, weight):
        outputs, _ = model.apply(params, model_state, dataset.prepare(x))
        losses = problem.example_losses(outputs, y)
        scores = problem.example_scores(outputs, y)
        return jnp.sum(losses * weight), jnp.sum(scores * weight)

    # One shape for every split, so one compilation.
    size = min(EVALUATION_BATCH, max(map(len, (dataset.train, dataset.validation, dataset.test))))

    def evaluation(params, model_state, split):
        if not len(split):
            return {"loss": float("nan"), problem.score_name: float("nan")}
        totals = []
        for start in range(0, len(split), size):
            indices = np.arange(start, start + size)
            part = split.take(np.minimum(indices, len(split) - 1))
            weight = (indices < len(split)).astype(np.float32)
            totals.append(sums(params, model_state, part.x, part.y, weight))
        loss, score = np.sum(np.asarray(jax.device_get(totals), np.float64), axis=0) / len(split)
        return {"loss": float(loss), problem.score_name: float(score)}

    return evaluation
