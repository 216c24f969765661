import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.experiments.data.augment import build_augmentation, crop, flip, rotate, shift, zoom
from optalr.experiments.errors import ExperimentError

IMAGES = jnp.asarray(np.random.default_rng(0).integers(1, 256, (64, 8, 8, 2), np.uint8))
KEY = jax.random.key(0)


def test_flip_mirrors_about_half_of_the_images():
    found = np.asarray(flip(KEY, IMAGES))
    mirrored = (found == np.asarray(IMAGES)[:, :, ::-1]).all((1, 2, 3))
    same = (found == np.asarray(IMAGES)).all((1, 2, 3))
    assert (mirrored | same).all()
    assert 16 < mirrored.sum() < 48


@pytest.mark.parametrize(("function", "strength", "reach"), [(shift, 0.25, 2), (crop, 3, 3)])
def test_shift_and_crop_move_by_whole_pixels_within_reach(function, strength, reach):
    found = np.asarray(function(KEY, IMAGES, strength))
    padded = np.pad(np.asarray(IMAGES), ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    places = set()
    for before, after in zip(padded, found, strict=True):
        matches = [
            (i, j)
            for i in range(2 * reach + 1)
            for j in range(2 * reach + 1)
            if (before[i : i + 8, j : j + 8] == after).all()
        ]
        assert len(matches) == 1
        places.add(matches[0])
    assert len(places) > reach * reach


def _patterns():
    y, x = np.mgrid[-7:8, -7:8].astype(np.float32)
    blob = np.exp(-((y - 1) ** 2 + (x - 4) ** 2) / 4)
    return jnp.asarray(np.tile(blob[None, :, :, None], (32, 1, 1, 1)))


def _centres(images):
    y, x = np.mgrid[-7:8, -7:8]
    mass = np.asarray(images)[..., 0]
    total = mass.sum((1, 2))
    return (mass * y).sum((1, 2)) / total, (mass * x).sum((1, 2)) / total


def test_rotate_turns_about_the_centre_within_its_angle():
    y, x = _centres(rotate(KEY, _patterns(), 20))
    angles = np.rad2deg(np.arctan2(y, x) - np.arctan2(1, 4))
    assert (np.abs(angles) < 21).all()
    assert angles.max() > 8
    assert angles.min() < -8
    np.testing.assert_allclose(np.hypot(y, x), np.hypot(1, 4), rtol=0.03)


def test_zoom_scales_about_the_centre_within_its_factor():
    y, x = _centres(zoom(KEY, _patterns(), 0.2))
    factors = np.hypot(y, x) / np.hypot(1, 4)
    assert (np.abs(factors - 1) < 0.22).all()
    assert factors.max() > 1.08
    assert factors.min() < 0.92


@pytest.mark.parametrize("name", ["flip", "shift", "crop:2", "zoom:0.2", "rotate:10"])
def test_shape_dtype_and_dependence_on_the_key_alone(name):
    augment = build_augmentation([name])
    one, two = augment(KEY, IMAGES), augment(KEY, IMAGES)
    assert one.shape == IMAGES.shape
    assert one.dtype == IMAGES.dtype
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, augment(jax.random.key(1), IMAGES))


def test_changes_follow_one_another_and_none_is_none():
    assert build_augmentation(()) is None
    both = build_augmentation(["flip", "crop:1"])(KEY, IMAGES)
    keys = jax.random.split(KEY, 2)
    np.testing.assert_array_equal(both, crop(keys[1], flip(keys[0], IMAGES), 1))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("flp", "did you mean 'flip'"), ("zoom:big", "positive number"), ("crop:-1", "positive")],
)
def test_a_mistake_is_named(name, wanted):
    with pytest.raises(ExperimentError, match=wanted):
        build_augmentation([name])
