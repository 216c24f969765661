"""Fully connected models."""

import flax.linen as nn
import jax

from optalr.experiments.configs.calling import Count


class MLP(nn.Module):
    """Dense layers with a ReLU between them; without hidden ones, a linear model."""

    features: int
    hidden: tuple[int, ...] = (128, 64)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, features)`` outputs."""
        del train
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.features)(x)


def mlp(num_classes: int, hidden: tuple[Count, ...] = (128, 64)) -> nn.Module:
    """Build dense layers of the given widths, with a ReLU between them."""
    return MLP(num_classes, hidden)


def linear(num_classes: int) -> nn.Module:
    """Build one dense layer: linear or logistic regression, whichever the data asks for."""
    return MLP(num_classes, ())
