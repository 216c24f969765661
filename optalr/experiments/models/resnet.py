"""Residual nets for small images: v1 (He et al. 2015) and v2 (He et al. 2016)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from optalr.experiments.configs.calling import Depth
from optalr.experiments.errors import ExperimentError
from optalr.experiments.models.convolution import global_mean

# No biases: batch normalization would subtract them again.
_conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())


def _norm(x: jax.Array, train: bool) -> jax.Array:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def _padded_shortcut(x: jax.Array, width: int, stride: int) -> jax.Array:
    """Return option A of the paper: every ``stride``-th pixel, with zeros as the new channels."""
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (v1): the ReLU comes after the sum."""

    width: int
    stride: int = 1
    projection: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return the block's output."""
        strides = (self.stride, self.stride)
        y = nn.relu(_norm(_conv(self.width, (3, 3), strides, padding=1)(x), train))
        y = _norm(_conv(self.width, (3, 3), padding=1)(y), train)
        if x.shape != y.shape:
            if self.projection:
                x = _norm(_conv(self.width, (1, 1), strides)(x), train)
            else:
                x = _padded_shortcut(x, self.width, self.stride)
        return nn.relu(x + y)


class PreactivationBottleneck(nn.Module):
    """Convolutions 1 x 1, 3 x 3, 1 x 1 beside a shortcut (v2), each after a norm and a ReLU."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return the block's output, of ``4 * width`` channels."""
        strides = (self.stride, self.stride)
        out = 4 * self.width
        y = nn.relu(_norm(x, train))
        # As in the paper: a projection starts from the normalized input, an identity from the raw.
        if x.shape[-1] != out or self.stride != 1:
            x = _conv(out, (1, 1), strides)(y)
        y = _conv(self.width, (1, 1))(y)
        y = nn.relu(_norm(y, train))
        y = _conv(self.width, (3, 3), strides, padding=1)(y)
        y = nn.relu(_norm(y, train))
        return x + _conv(out, (1, 1))(y)


class ResNetV1(nn.Module):
    """Stages of basic blocks, each twice as wide as the last and with images half as high."""

    features: int
    blocks: tuple[int, ...]
    width: int
    projection: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, features)`` logits."""
        x = nn.relu(_norm(_conv(self.width, (3, 3), padding=1)(x), train))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                # The first block of every later stage halves height and width.
                stride = 2 if stage and not block else 1
                x = BasicBlock(self.width << stage, stride, self.projection)(x, train)
        return nn.Dense(self.features)(global_mean(x))


class ResNetV2(nn.Module):
    """Three stages of pre-activation bottlenecks, of widths 16, 32 and 64."""

    features: int
    blocks: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, features)`` logits."""
        x = _conv(16, (3, 3), padding=1)(x)
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                x = PreactivationBottleneck(16 << stage, stride)(x, train)
        x = nn.relu(_norm(x, train))
        return nn.Dense(self.features)(global_mean(x))


def resnet(num_classes: int, depth: Depth = 20, version: int = 1) -> nn.Module:
    """Build a ResNet for small images.

    Args:
      num_classes: classes.
      depth: 18 (four stages, of 64 to 512 channels), or with three stages ``6n + 2`` (20, 56, 110)
        for version 1 and ``9n + 2`` (164) for version 2.
      version: 1 or 2.

    Raises:
      ExperimentError: there is no resnet of that depth and version.
    """
    if version == 1 and depth == 18:
        return ResNetV1(num_classes, (2, 2, 2, 2), 64, True)
    # Two layers per block (three in a bottleneck), three stages, and two layers outside of blocks.
    if version == 1 and depth > 7 and depth % 6 == 2:
        return ResNetV1(num_classes, ((depth - 2) // 6,) * 3, 16, False)
    if version == 2 and depth > 10 and depth % 9 == 2:
        return ResNetV2(num_classes, (depth - 2) // 9)
    raise ExperimentError(
        f"model.depth {depth!r} and model.version {version!r} make no resnet: take depth 18 or "
        "6n+2 (20, 56, 110) with version 1, or 9n+2 (164) with version 2."
    )
