"""A submission to the benchmark AlgoPerf: ``optalr.untuned``, with no number tuned.

The five functions of its JAX interface. The harness calls them in this order: ``get_batch_size``,
``init_optimizer_state``, then ``data_selection`` and ``update_params`` in each step, and
``prepare_for_eval`` before it evaluates. README.md beside this file says what stands in the way of
a run, and how the functions are tested.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from algoperf import jax_sharding_utils, spec

import optalr

# The harness decides nothing about batches; these are those of its own baselines.
BATCH_SIZES = {
    "criteo1tb": 262_144,
    "fastmri": 32,
    "imagenet_resnet": 1024,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "ogbg": 512,
    "wmt": 128,
}
# Convolutions are measured at a sample of positions, and every layer on every other example. The
# moments stay unbiased, and the patches of an ImageNet batch fit in memory.
EVERY, MAX_POSITIONS = 2, 64


class Optimizer(NamedTuple):
    """What the harness carries from step to step as ``optimizer_state``."""

    state: Any = None  # of the transformation
    step: Callable[..., Any] | None = None  # the compiled step


def get_batch_size(workload_name: str) -> int:
    """Return the number of examples in a training batch."""
    return BATCH_SIZES[workload_name]


def init_optimizer_state(
    workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any
) -> Optimizer:
    """Return an empty optimizer: it is made with the first batch.

    Which leaves are layers, and how an attention kernel is split into rows and columns, is read
    from the traced loss, and the loss needs a batch.
    """
    del workload, model_params, model_state, hyperparameters, rng
    return Optimizer()


def mean_loss(
    workload: Any, label_smoothing: float
) -> Callable[[Any, Any, Any, Any], tuple[jax.Array, Any]]:
    """Return ``(params, model_state, batch, rng) -> (mean loss, new model state)``."""

    def loss_fn(params: Any, model_state: Any, batch: Any, rng: Any) -> tuple[jax.Array, Any]:
        logits, new_model_state = workload.model_fn(
            params, batch, model_state, spec.ForwardPassMode.TRAIN, rng, update_batch_norm=True
        )
        found = workload.loss_fn(
            label_batch=batch["targets"],
            logits_batch=logits,
            mask_batch=batch.get("weights"),
            label_smoothing=label_smoothing,
        )
        return found["summed"] / found["n_valid_examples"], new_model_state

    return loss_fn


def start(workload: Any, hyperparameters: Any, params: Any, *args: Any) -> Optimizer:
    """Return the optimizer, made for a workload by its first batch."""
    loss_fn = mean_loss(workload, getattr(hyperparameters, "label_smoothing", 0.0))
    layout = optalr.coverage(loss_fn, params, *args)
    tx = optalr.untuned(workload.step_hint, layout=layout)
    evaluate = optalr.value_grad_and_extras(
        loss_fn, has_aux=True, every=EVERY, max_positions=MAX_POSITIONS
    )

    def step(params: Any, state: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        wanted = optalr.wants_signals(state)
        (loss, model_state), grads, extras = evaluate(
            params, model_state, batch, rng, signals=wanted
        )
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, model_state, loss

    replicated = jax_sharding_utils.get_replicate_sharding()
    sharded = jax_sharding_utils.get_batch_dim_sharding()
    compiled = jax.jit(
        step,
        in_shardings=(replicated, replicated, replicated, sharded, replicated),
        out_shardings=(replicated, replicated, replicated, replicated),
        donate_argnums=(0, 1, 2),
    )
    return Optimizer(tx.init(params), compiled)


def update_params(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: dict[str, Any],
    loss_type: Any,
    optimizer_state: Optimizer,
    eval_results: list[tuple[int, float]],
    global_step: int,
    rng: Any,
    train_state: dict[str, Any] | None = None,
) -> tuple[Optimizer, Any, Any]:
    """Return the optimizer, the parameters and the model's state after one step."""
    del current_params_types, loss_type, eval_results, train_state
    params = current_param_container
    if optimizer_state.step is None:
        optimizer_state = start(workload, hyperparameters, params, model_state, batch, rng)
    state, step = optimizer_state
    assert step is not None
    params, state, model_state, loss = step(params, state, model_state, batch, rng)
    if global_step % 100 == 0 and workload.metrics_logger is not None:
        numbers = {"loss": float(loss), "learning_rate": optalr.metrics(state)["learning_rate"]}
        workload.metrics_logger.append_scalar_metrics(numbers, global_step)
    return Optimizer(state, step), params, model_state


def prepare_for_eval(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: Optimizer,
    eval_results: list[tuple[int, float]],
    global_step: int,
    rng: Any,
) -> tuple[Optimizer, Any, Any]:
    """Return everything as it is: what is trained is what is evaluated."""
    del workload, current_params_types, hyperparameters, loss_type, eval_results, global_step, rng
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: Any,
    input_queue: Iterator[dict[str, Any]],
    optimizer_state: Optimizer,
    current_param_container: Any,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> dict[str, Any]:
    """Return the next batch of the queue."""
    del workload, optimizer_state, current_param_container, model_state
    del hyperparameters, global_step, rng
    return next(input_queue)
