"""The AlgoPerf submission, called as the benchmark's harness calls it."""

import importlib.util
import inspect
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from sklearn.datasets import load_digits

import optalr

SUBMISSION = pathlib.Path(__file__).parents[1] / "examples" / "algoperf" / "submission.py"
# The arguments of the harness, in its order.
EVAL = ["workload", "current_param_container", "current_params_types", "model_state",
        "hyperparameters", "loss_type", "optimizer_state", "eval_results", "global_step",
        "rng"]  # fmt: skip
SIGNATURES = {
    "get_batch_size": ["workload_name"],
    "init_optimizer_state": ["workload", "model_params", "model_state", "hyperparameters", "rng"],
    "update_params": [*EVAL[:5], "batch", *EVAL[5:], "train_state"],
    "prepare_for_eval": EVAL,
    "data_selection": ["workload", "input_queue", "optimizer_state", "current_param_container",
                       "model_state", "hyperparameters", "global_step", "rng"],
}  # fmt: skip


def shim():
    """Return the modules of the harness that a submission imports, as far as it uses them."""
    package, spec = types.ModuleType("algoperf"), types.ModuleType("algoperf.spec")
    sharding = types.ModuleType("algoperf.jax_sharding_utils")
    spec.ForwardPassMode = types.SimpleNamespace(TRAIN=0, EVAL=1)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    partition = jax.sharding.PartitionSpec
    sharding.get_replicate_sharding = lambda: jax.sharding.NamedSharding(mesh, partition())
    sharding.get_batch_dim_sharding = lambda: jax.sharding.NamedSharding(mesh, partition("batch"))
    package.spec, package.jax_sharding_utils = spec, sharding
    return {m.__name__: m for m in (package, spec, sharding)}


@pytest.fixture(scope="module")
def submission():
    with pytest.MonkeyPatch.context() as patch:
        for name, module in shim().items():
            patch.setitem(sys.modules, name, module)
        found = importlib.util.spec_from_file_location("submission", SUBMISSION)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        yield module


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(32)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x)).reshape(len(x), 4, 8)
        x = x + nn.MultiHeadDotProductAttention(2)(x)
        return nn.Dense(10)(x.reshape(len(x), -1))


class Workload:
    """A workload as submissions see it: a model, a loss, and how long a run is."""

    step_hint = 60

    def __init__(self):
        self.logged = []
        self.metrics_logger = self
        self.model = Net()

    def append_scalar_metrics(self, numbers, step):
        self.logged.append((step, numbers))

    def init_model_fn(self, rng):
        variables = self.model.init(rng, jnp.zeros((1, 64)), train=False)
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    def model_fn(self, params, batch, model_state, mode, rng, update_batch_norm):
        del rng
        train = mode == 0 and update_batch_norm
        variables = {"params": params, **model_state}
        logits, changed = self.model.apply(
            variables, batch["inputs"], train=train, mutable=["batch_stats"]
        )
        return logits, changed

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        targets = optax.smooth_labels(jax.nn.one_hot(label_batch, 10), label_smoothing)
        losses = optax.softmax_cross_entropy(logits_batch, targets)
        weights = jnp.ones_like(losses) if mask_batch is None else mask_batch
        summed, valid = jnp.sum(weights * losses), jnp.sum(weights)
        return {"summed": summed, "n_valid_examples": valid, "per_example": losses}


def batches():
    digits = load_digits()
    order = np.random.default_rng(0)
    while True:
        chosen = order.choice(1400, 128, replace=False)
        x = (digits.data[chosen] / 16.0).astype(np.float32)
        yield {"inputs": x, "targets": digits.target[chosen], "weights": np.ones(128, np.float32)}


def test_the_functions_take_what_the_harness_hands_them(submission):
    for name, expected in SIGNATURES.items():
        assert list(inspect.signature(getattr(submission, name)).parameters) == expected
    assert submission.get_batch_size("wmt") == 128


@pytest.mark.slow
def test_a_run_in_the_order_of_the_harness(submission):
    workload, queue, results = Workload(), batches(), []
    rng = jax.random.key(0)
    params, model_state = workload.init_model_fn(rng)
    optimizer = submission.init_optimizer_state(workload, params, model_state, None, rng)
    for step in range(workload.step_hint):
        step_rng = jax.random.fold_in(rng, step)
        batch = submission.data_selection(
            workload, queue, optimizer, params, model_state, None, step, step_rng
        )
        optimizer, params, model_state = submission.update_params(
            workload, params, None, model_state, None, batch, None, optimizer, results, step,
            step_rng, train_state=None,
        )  # fmt: skip
        if step % 30 == 29:
            optimizer, params, model_state = submission.prepare_for_eval(
                workload, params, None, model_state, None, None, optimizer, results, step, step_rng
            )
            results.append((step, accuracy(workload, params, model_state)))
    assert results[-1][1] > 0.85
    # The first arrays of this loop lie on one device, those that come back on all.
    assert optimizer.step._cache_size() <= 2
    assert workload.logged[0][0] == 0
    assert int(optalr.metrics(optimizer.state)["failures"]) == 0


def accuracy(workload, params, model_state):
    test = {"inputs": jnp.asarray(load_digits().data[1400:] / 16.0)}
    logits, _ = workload.model_fn(params, test, model_state, 1, None, update_batch_norm=False)
    return float((logits.argmax(1) == load_digits().target[1400:]).mean())
