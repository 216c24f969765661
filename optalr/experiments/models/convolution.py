"""Plain convolution nets: LeNet, the CNN of the Lipschitz paper, AlexNet and VGG for small images.

Images are ``(N, height, width, channels)`` with 28 x 28 or 32 x 32 pixels.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from optalr.experiments.configs.calling import Count, CountOrNone, Part, Positive
from optalr.experiments.errors import ExperimentError

# Kaiming's initialization keeps the signal's scale through a deep net of ReLUs.
_he = nn.initializers.he_normal()


def _pool(x: jax.Array, size: int = 2) -> jax.Array:
    """Halve height and width by the maximum of windows, which overlap where ``size`` is 3."""
    return nn.max_pool(x, (size, size), (2, 2))


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


class LeNet(nn.Module):
    """Two 5 x 5 convolutions and three dense layers, with dropout after the first two of these."""

    features: int
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, features)`` logits."""
        # LeCun padded images of 28 x 28 to 32 x 32.
        padding = "SAME" if x.shape[1] < 32 else "VALID"
        x = _pool(nn.relu(nn.Conv(6, (5, 5), padding=padding)(x)))
        x = _pool(nn.relu(nn.Conv(16, (5, 5), padding="VALID")(x)))
        x = _flat(x)
        for width in (120, 84):
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.features)(x)


class TableOne(nn.Module):
    """The CNN of the Lipschitz paper's table 1: five 3 x 3 convolutions, two dense layers."""

    features: int
    batch_norm_momentum: float = 0.9
    dropouts: tuple[float, float, float, float] = (0.2, 0.25, 0.25, 0.25)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, features)`` logits."""

        def dropout(x, i):
            return nn.Dropout(self.dropouts[i], deterministic=not train)(x)

        for i, (width, padding) in enumerate(((32, "VALID"), (64, "SAME"))):
            x = nn.relu(nn.Conv(width, (3, 3), padding=padding)(x))
            x = nn.relu(nn.Conv(width, (3, 3), padding=padding)(x))
            x = dropout(_pool(x), i)
        x = dropout(nn.relu(nn.Conv(128, (3, 3))(x)), 2)
        x = nn.relu(nn.Dense(128)(_flat(x)))
        x = nn.BatchNorm(use_running_average=not train, momentum=self.batch_norm_momentum)(x)
        return nn.Dense(self.features)(dropout(x, 3))


class AlexNet(nn.Module):
    """AlexNet with kernels and strides for small images: five convolutions, three dense layers."""

    features: int
    width: int = 64
    dense: int = 1024
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, features)`` logits."""
        w = self.width
        # The original's proportions: 64-192-384-256-256 with pools after 1, 2 and 5.
        x = _pool(nn.relu(nn.Conv(w, (5, 5), kernel_init=_he)(x)), 3)
        x = _pool(nn.relu(nn.Conv(3 * w, (5, 5), kernel_init=_he)(x)), 3)
        x = nn.relu(nn.Conv(6 * w, (3, 3), kernel_init=_he)(x))
        x = nn.relu(nn.Conv(4 * w, (3, 3), kernel_init=_he)(x))
        x = _pool(nn.relu(nn.Conv(4 * w, (3, 3), kernel_init=_he)(x)))
        x = _flat(x)
        for _ in range(2):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.relu(nn.Dense(self.dense, kernel_init=_he)(x))
        return nn.Dense(self.features)(x)


# Widths of the convolutions between pools: configurations A, B, D and E of Simonyan & Zisserman.
_VGG = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """VGG with one dense layer of ``dense`` before the last, for small images."""

    features: int
    blocks: Sequence[Sequence[int]] = _VGG[16]
    dense: int = 512
    dropout: float = 0.5
    batch_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, features)`` logits."""
        for block in self.blocks:
            for width in block:
                # A bias before batch normalization would only be subtracted again.
                x = nn.Conv(width, (3, 3), use_bias=not self.batch_norm, kernel_init=_he)(x)
                if self.batch_norm:
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
                x = nn.relu(x)
            # Five pools would leave nothing of images below 32 x 32.
            if min(x.shape[1:3]) > 1:
                x = _pool(x)
        x = _flat(x)
        if self.dense:
            x = nn.relu(nn.Dense(self.dense, kernel_init=_he)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.features)(x)


class SmallCNN(nn.Module):
    """3 x 3 convolutions, each followed by a pool, and one dense layer before the last."""

    features: int
    widths: tuple[int, ...] = (16, 32)
    dense: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, features)`` logits."""
        del train
        for width in self.widths:
            x = _pool(nn.relu(nn.Conv(width, (3, 3))(x)))
        x = nn.relu(nn.Dense(self.dense)(_flat(x)))
        return nn.Dense(self.features)(x)


def lenet(num_classes: int, dropout: Part = 0.5) -> nn.Module:
    """Build LeNet with dropout, as the paper on the learned rate trains it."""
    return LeNet(num_classes, dropout)


def table1_cnn(num_classes: int, batch_norm_momentum: Part = 0.9) -> nn.Module:
    """Build the CNN of the Lipschitz paper's table 1, with 730 000 parameters."""
    return TableOne(num_classes, batch_norm_momentum)


def alexnet(
    num_classes: int, *, width: Count = 64, dense: Count = 1024, dropout: Part = 0.5
) -> nn.Module:
    """Build AlexNet for small images; ``width`` scales its convolutions."""
    return AlexNet(num_classes, width=width, dense=dense, dropout=dropout)


def vgg(
    num_classes: int,
    *,
    depth: int = 16,
    width: Positive = 1.0,
    dense: CountOrNone = 512,
    dropout: Part = 0.5,
    batch_norm: bool = True,
) -> nn.Module:
    """Build VGG-11, 13, 16 or 19 for small images; ``width`` scales its convolutions."""
    if depth not in _VGG:
        raise ExperimentError(f"model.depth must be 11, 13, 16 or 19 for vgg, got {depth!r}.")
    blocks = tuple(tuple(max(1, round(width * w)) for w in block) for block in _VGG[depth])
    return VGG(num_classes, blocks=blocks, dense=dense, dropout=dropout, batch_norm=batch_norm)


def cnn(num_classes: int, widths: tuple[Count, ...] = (16, 32), dense: Count = 64) -> nn.Module:
    """Build a small CNN with one convolution and one pool for each of ``widths``."""
    return SmallCNN(num_classes, widths, dense)


def global_mean(x: jax.Array) -> jax.Array:
    """Return the mean over an image's positions."""
    return jnp.mean(x, axis=(1, 2))
