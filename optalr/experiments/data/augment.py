"""Random changes of training images, as jitted functions of a key and a batch.

Images are ``(N, height, width, channels)`` and keep their dtype. Pixels that come in from outside
are zero. A name may carry its strength after a colon, as in ``rotate:15``:

    flip         mirror left and right, with probability one half
    shift:0.1    move by up to this part of the size, in whole pixels
    crop:4       pad by so many pixels, then cut out the size at a random place
    zoom:0.1     enlarge or shrink by up to this factor
    rotate:15    turn by up to so many degrees
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from optalr.experiments.errors import ExperimentError, suggest

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]


def flip(key: jax.Array, images: jax.Array, probability: float = 0.5) -> jax.Array:
    """Mirror each image left and right with ``probability``."""
    chosen = jax.random.bernoulli(key, probability, (len(images), 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def shift(key: jax.Array, images: jax.Array, part: float = 0.1) -> jax.Array:
    """Move each image by up to ``part`` of its height and width, in whole pixels."""
    height, width = images.shape[1:3]
    return _cut(key, images, reach=(round(part * height), round(part * width)))


def crop(key: jax.Array, images: jax.Array, pixels: float = 4) -> jax.Array:
    """Pad each image by ``pixels`` and cut its size out at a random place."""
    return _cut(key, images, reach=(round(pixels), round(pixels)))


def zoom(key: jax.Array, images: jax.Array, factor: float = 0.1) -> jax.Array:
    """Enlarge or shrink each image about its centre by up to ``factor``."""
    scales = jax.random.uniform(key, (len(images),), minval=1 - factor, maxval=1 + factor)
    zero = jnp.zeros_like(scales)
    # Sampling goes from the new image to the old one, hence the inverse.
    return _resample(images, ((1 / scales, zero), (zero, 1 / scales)))


def rotate(key: jax.Array, images: jax.Array, degrees: float = 15) -> jax.Array:
    """Turn each image about its centre by up to ``degrees`` either way."""
    limit = jnp.deg2rad(degrees)
    angles = jax.random.uniform(key, (len(images),), minval=-limit, maxval=limit)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return _resample(images, ((cos, -sin), (sin, cos)))


AUGMENTATIONS: Mapping[str, Callable[..., jax.Array]] = MappingProxyType(
    {"crop": crop, "flip": flip, "rotate": rotate, "shift": shift, "zoom": zoom}
)


def build_augmentation(names: Sequence[str]) -> Augmentation | None:
    """Return one function that applies each named change in turn, or None for no names.

    Raises:
      ExperimentError: an unknown name, or a strength that is not a positive number.
    """
    chosen = [_parse(name) for name in names]
    if not chosen:
        return None

    @jax.jit
    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        for step_key, (function, strengths) in zip(
            jax.random.split(key, len(chosen)), chosen, strict=True
        ):
            images = function(step_key, images, *strengths)
        return images

    return augment


def _parse(text: str) -> tuple[Callable[..., jax.Array], tuple[float, ...]]:
    """Split ``name:strength`` into the function and its arguments; without a colon it has none."""
    name, colon, strength = str(text).partition(":")
    if name not in AUGMENTATIONS:
        hint = suggest(name, AUGMENTATIONS)
        raise ExperimentError(f"unknown name {name!r} in data.augment: {hint}")
    if not colon:
        return AUGMENTATIONS[name], ()
    try:
        number = float(strength)
    except ValueError:
        number = -1.0
    if not 0 < number < math.inf:
        raise ExperimentError(
            f"data.augment {text!r}: what stands after the colon must be a positive number."
        )
    return AUGMENTATIONS[name], (number,)


def _cut(key: jax.Array, images: jax.Array, reach: tuple[int, int]) -> jax.Array:
    """Move each image by up to ``reach`` pixels down or up, and right or left."""
    num, height, width, channels = images.shape
    down, right = reach
    padded = jnp.pad(images, ((0, 0), (down, down), (right, right), (0, 0)))
    keys = jax.random.split(key)
    tops = jax.random.randint(keys[0], (num,), 0, 2 * down + 1)
    lefts = jax.random.randint(keys[1], (num,), 0, 2 * right + 1)

    def cut(image, top, left):
        return jax.lax.dynamic_slice(image, (top, left, 0), (height, width, channels))

    return jax.vmap(cut)(padded, tops, lefts)


# Two rows of two entries, each with one number per image.
_Matrices = tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _resample(images: jax.Array, matrices: _Matrices) -> jax.Array:
    """Sample each image at its matrix times ``(y, x)`` about its centre, bilinearly."""
    height, width = images.shape[1:3]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2], jnp.float32)
    y, x = jnp.meshgrid(
        jnp.arange(height) - centre[0], jnp.arange(width) - centre[1], indexing="ij"
    )

    def one(image, matrix):
        rows, columns = (m[0] * y + m[1] * x + c for m, c in zip(matrix, centre, strict=True))

        def plane(channel):
            return map_coordinates(channel, [rows, columns], order=1, mode="constant")

        return jax.vmap(plane, in_axes=-1, out_axes=-1)(image)

    moved = jax.vmap(one)(images.astype(jnp.float32), matrices)
    # A cast alone would round every pixel down, and darken the images.
    if jnp.issubdtype(images.dtype, jnp.integer):
        moved = jnp.round(moved)
    return moved.astype(images.dtype)
