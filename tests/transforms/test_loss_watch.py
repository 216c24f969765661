"""The watch that bounds steps once the loss has risen, for losses of any sign."""

import jax
import jax.numpy as jnp
import pytest

from optalr.transforms.shared.loss_watch import start_watch, watch_loss


def rises(losses, max_rise=1.5):
    watch, found = start_watch(), []
    for loss in losses:
        watch = jax.jit(watch_loss, static_argnums=2)(watch, jnp.float32(loss), max_rise)
        found.append(bool(watch.risen))
    return found


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 1.0, 2.9, 3.1, 1.0], [False, False, False, True, True]),
        ([-1.0, -1.1, -2.0], [False, False, False]),  # falling, below zero
        ([-1.0, -0.6, -0.4], [False, False, True]),
        ([-1.0, 1.0], [False, True]),
        ([0.0, -1.0, 0.0, 0.1], [False, False, False, True]),
        ([-1.0, float("nan")], [False, True]),
        ([1.0, float("inf")], [False, True]),
    ],
    ids=str,
)
def test_a_loss_of_any_sign_has_risen_by_half_its_size(losses, expected):
    assert rises(losses) == expected


@pytest.mark.parametrize("first", [2.0, -2.0])
def test_without_room_to_rise_the_bound_holds_from_the_start(first):
    assert rises([first], max_rise=0.0) == [True]


def test_a_loss_that_is_not_known_changes_nothing():
    watch = start_watch()
    assert watch_loss(watch, None, 1.5) is watch
