"""The counts of `benchmarks/devices.py`, beside compiled programs for eight simulated devices."""

import pytest

from benchmarks import devices


@pytest.mark.slow
def test_counts_are_those_of_compiled_programs():
    counted, found = devices.check()
    assert counted.keys() == found.keys()
    for name, number in counted.items():
        assert found[name] == pytest.approx(number, rel=0.05), name


def test_a_model_of_a_billion_parameters_and_one_of_seven():
    sizes = {
        name: sum(leaf.size for leaf in devices.transformer(*shape).values())
        for name, shape in devices.MODELS.items()
    }
    assert sizes["1B"] == pytest.approx(1.4e9, rel=0.02)
    assert sizes["7B"] == pytest.approx(6.85e9, rel=0.01)


def test_a_refresh_costs_a_device_less_the_more_devices_there_are():
    numbers = {2048: 100, 512: 50}
    costs = [devices.refresh(numbers, count, "whole").flops for count in (1, 8, 64)]
    assert costs[0] / costs[1] > 7
    assert costs[1] / costs[2] > 5
    assert devices.refresh(numbers, 1024, "whole").flops == devices.ROOT * 2048**3
