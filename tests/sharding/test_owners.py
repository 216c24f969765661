"""Who takes which matrices."""

import numpy as np
import pytest

from optalr.sharding.owners import share_out


def loads(sizes, numbers, num_devices):
    """Return the cost of each device's share."""
    shares = share_out(sizes, numbers, num_devices)
    return sum(share.counts * float(size) ** 3 for size, share in zip(sizes, shares, strict=True))


def test_every_matrix_has_one_owner_and_neighbours_stay_together():
    for share, number in zip(share_out([4, 7, 2], [5, 3, 0], 4), [5, 3, 0], strict=True):
        taken = [
            place
            for start, count in zip(share.starts, share.counts, strict=True)
            for place in range(start, start + count)
        ]
        assert taken == list(range(number))


def test_a_device_without_a_large_matrix_takes_more_small_ones():
    large, small = share_out([4, 2], [1, 8], 2)
    assert large.counts.tolist() == [1, 0]
    assert small.counts.tolist() == [0, 8]


@pytest.mark.parametrize("num_devices", [2, 8, 64])
def test_no_device_has_more_than_the_mean_and_one_matrix(num_devices):
    random = np.random.default_rng(num_devices)
    sizes, numbers = random.integers(2, 5000, 12), random.integers(1, 40, 12)
    costs = loads(sizes.tolist(), numbers.tolist(), num_devices)
    assert costs.max() <= costs.mean() + sizes.max() ** 3


# The matrices of a GPT of 12 blocks of 768 (attention, its projection, a net of 3072), and three
# large ones besides.
@pytest.mark.parametrize("large", [0, 3])
def test_the_busiest_device_has_little_more_than_the_mean(large):
    costs = loads([768, 2304, 3072, 4608], [60, 12, 24, large], 8)
    assert costs.max() <= 1.1 * costs.mean()


def test_as_many_kinds_of_programs_as_there_are_different_numbers():
    (share,) = share_out([4608], [3], 8)
    assert share.counts.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
