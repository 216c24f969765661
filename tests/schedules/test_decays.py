import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr import schedules

STEPS = np.arange(60)


def values(schedule, steps=STEPS):
    out = jax.jit(jax.vmap(schedule))(jnp.asarray(steps))
    assert out.dtype == jnp.float32
    return np.asarray(out, np.float64)


def test_decays_against_their_formulas():
    np.testing.assert_allclose(
        values(schedules.inverse_decay(0.3, 0.2)), 0.3 / (1 + 0.2 * STEPS), rtol=1e-6
    )
    np.testing.assert_allclose(
        values(schedules.exponential_rate_decay(0.3, 0.2)), 0.3 * np.exp(-0.2 * STEPS), rtol=1e-5
    )
    np.testing.assert_allclose(
        values(schedules.halving(0.3, 7, min_value=0.05)),
        np.maximum(0.3 * 0.5 ** (STEPS // 7), 0.05),
        rtol=1e-6,
    )


@pytest.mark.parametrize("variant", ["triangular", "triangular2", "exp_range", "custom"])
def test_triangular_against_the_papers_formula(variant):
    low, high, half, gamma = 0.1, 0.9, 5, 0.97
    cycle = np.floor(1 + STEPS / (2 * half))
    x = np.abs(STEPS / half - 2 * cycle + 1)
    amplitude = {
        "triangular": np.ones(len(STEPS)),
        "triangular2": 0.5 ** (cycle - 1),
        "exp_range": gamma**STEPS,
        "custom": 1 / cycle,
    }[variant]
    expected = low + (high - low) * np.maximum(0, 1 - x) * amplitude
    arguments = {"variant": (lambda c: 1 / c) if variant == "custom" else variant}
    if variant == "exp_range":
        arguments["gamma"] = gamma
    schedule = schedules.triangular(low, high, half, **arguments)
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-5)


def test_triangular_is_exact_after_many_steps():
    schedule = schedules.triangular(0.0, 1.0, 1000)
    far = 2000 * 1_000_000 + 250
    np.testing.assert_allclose(values(schedule, np.array([far])), [0.25], rtol=1e-6)


def test_python_counts_work_too():
    assert float(schedules.halving(1.0, 2)(5)) == 0.25


def test_arguments_are_refused_at_construction():
    with pytest.raises(ValueError, match="rate"):
        schedules.inverse_decay(0.1, -1.0)
    with pytest.raises(ValueError, match="init_value"):
        schedules.exponential_rate_decay(-0.1, 1.0)
    with pytest.raises(ValueError, match="every"):
        schedules.halving(0.1, 0)
    with pytest.raises(ValueError, match="max_value"):
        schedules.triangular(0.2, 0.1, 5)
    with pytest.raises(TypeError, match="half_cycle"):
        schedules.triangular(0.1, 0.2, 2.5)
    with pytest.raises(ValueError, match="variant"):
        schedules.triangular(0.1, 0.2, 5, variant="sawtooth")
    for arguments in ({"variant": "exp_range"}, {"gamma": 0.9}):
        with pytest.raises(ValueError, match="gamma"):
            schedules.triangular(0.1, 0.2, 5, **arguments)
