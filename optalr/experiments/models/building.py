"""Building models by name, each as two functions of arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from optalr.experiments.configs.calling import USER_ERRORS, call, reason
from optalr.experiments.configs.config import ModelConfig
from optalr.experiments.data.dataset import Dataset
from optalr.experiments.errors import ExperimentError, suggest
from optalr.experiments.models import convolution, dense, resnet, transformer

# A builder's parameters are the keys that [model] may have for it; num_classes comes from the data.
MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "alexnet": convolution.alexnet,
        "cnn": convolution.cnn,
        "lenet": convolution.lenet,
        "linear": dense.linear,
        "mlp": dense.mlp,
        "resnet": resnet.resnet,
        "table1_cnn": convolution.table1_cnn,
        "transformer": transformer.transformer,
        "vgg": convolution.vgg,
    }
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A Flax module as two functions of its parameters and of its other collections.

    Attributes:
      module: the Flax module, called as ``module(x, train)``.
      example: a batch of one example, as the model takes it.
    """

    module: nn.Module
    example: jax.Array

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return ``(params, model_state)``, the second with the batch statistics, if any."""
        names = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        variables = dict(self.module.init(names, self.example, train=False))
        return variables.pop("params"), variables

    def apply(
        self, params: Any, model_state: Any, x: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Return ``(outputs, model_state)``: of training with a ``key``, of testing without."""
        variables = {"params": params, **model_state}
        if key is None:
            return self.module.apply(variables, x, train=False), model_state  # type: ignore
        # Training moves the other collections; testing must leave them alone.
        outputs, new = self.module.apply(
            variables, x, train=True, mutable=list(model_state), rngs={"dropout": key}
        )
        return outputs, {**model_state, **new}

    def has_convolutions(self) -> bool:
        """Return whether the forward pass convolves."""
        # Read from the trace, which shows convolutions in any kind of layer. Nothing is computed.
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        traced = jax.make_jaxpr(lambda p, s, x: self.apply(p, s, x)[0])(*shapes, self.example)
        return "conv_general_dilated" in str(traced)


def build_model(config: ModelConfig, dataset: Dataset) -> Model:
    """Build the model that ``config`` names, for the shapes of ``dataset``.

    Raises:
      ExperimentError: the name or an argument is unknown, or the model does not take examples of
        the data's shape.
    """
    if config.name not in MODELS:
        hint = suggest(config.name, MODELS)
        raise ExperimentError(f"unknown model.name {config.name!r}: {hint}")
    module = call(
        MODELS[config.name], config.options, section="model", num_classes=dataset.num_classes
    )
    model = Model(module, dataset.prepare(jnp.asarray(dataset.train.x[:1])))
    # Flax notices only at the first call whether shapes fit. An abstract call costs nothing.
    try:
        jax.eval_shape(model.init, jax.random.key(0))
    except USER_ERRORS as error:
        shape = dataset.train.x.shape[1:]
        raise ExperimentError(
            f"model {config.name!r} does not take {dataset.name} examples of shape {shape}: "
            f"{reason(error)}"
        ) from error
    return model
