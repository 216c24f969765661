"""Decay profiles: schedules by hand, and flows that follow them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import optalr
from benchmarks import decay

# A square nonlinear system F(w) = 0 as least squares: φ(w) = w + ½ sin(Qw) − c.
Q = np.array([[0.6, 0.8], [-0.8, 0.6]], np.float32)
TARGET = np.array([0.3, -0.5], np.float32)
LOSS = optalr.composite_loss(
    lambda w: w + 0.5 * jnp.sin(Q @ w) - TARGET, lambda z: 0.5 * jnp.sum(z**2)
)


def follow(learning_rate, num_updates):
    """Return F along the flow of the undamped Gauss-Newton matrix, solved exactly (k = 2)."""
    tx = optalr.edf(learning_rate, num_steps=2, damping=(0.0, 1.0))
    evaluate = optalr.value_grad_and_extras(LOSS)

    @jax.jit
    def step(w, state):
        _, grads, extras = evaluate(w)
        updates, state = tx.update(grads, state, w, **extras)
        return optax.apply_updates(w, updates), state, extras["outputs"]

    w = jnp.array([2.0, 1.0])
    state, outputs = tx.init(w), []
    for _ in range(num_updates + 1):
        w, state, z = step(w, state)
        outputs.append(np.asarray(z))
    return np.stack(outputs)


@pytest.mark.parametrize(
    ("profile", "rates"),
    [
        (optalr.exponential_profile, [0.25, 0.25, 0.25, 0.25, 0.25]),
        (optalr.linear_profile, [0.25, 1 / 3, 0.5, 1.0, 1.0]),
        (optalr.power_profile(2.0), [0.5, 0.4, 1 / 3, 2 / 7, 0.25]),
    ],
)
def test_schedule_by_hand(profile, rates):
    schedule = jax.jit(optalr.flow_schedule(profile, 0.25))
    np.testing.assert_allclose([schedule(i) for i in range(5)], rates, rtol=1e-6)
    assert schedule(0).dtype == jnp.float32


@pytest.mark.parametrize(
    ("profile", "rate"),
    [
        (optalr.exponential_profile, lambda t: 0.1),
        (optalr.power_profile(30.0), lambda t: 3.0 / (1.0 + t)),
    ],
    ids=["exponential", "power"],
)
@pytest.mark.parametrize("count", [860, 1000, 10**6])
def test_the_rate_outlives_the_profile_in_float32(profile, rate, count):
    schedule = optalr.flow_schedule(profile, 0.1)
    np.testing.assert_allclose(schedule(count), rate(0.1 * count), rtol=1e-6)


@pytest.mark.parametrize(
    ("profile", "late"),
    [
        (lambda t: jnp.exp(-t), 0.1),
        # |χ| = 2t where t² = 30 ln 10.
        (lambda t: jnp.exp(-(t**2)), 0.2 * np.sqrt(30 * np.log(10))),
        (lambda t: 1.0 - t, 5.0),
        (lambda t: (1.0 - jnp.minimum(t, 1.0)) ** 2, 5.0),
        (lambda t: jnp.sqrt(1.0 - t), 5.0),
    ],
    ids=["exponential", "gaussian", "linear", "quadratic", "root"],
)
@pytest.mark.parametrize("count", [860, 1000, 10**6])
def test_a_profile_of_ones_own_holds_its_last_rate(profile, late, count):
    schedule = jax.jit(optalr.flow_schedule(profile, 0.1, largest=5.0))
    np.testing.assert_allclose(schedule(count), late, rtol=1e-4)
    np.testing.assert_allclose(schedule(0), 0.1 * abs(jax.grad(profile)(0.0)), rtol=1e-6)


def test_a_schedule_may_be_made_inside_jit():
    @jax.jit
    def rate(scale, time_step):
        return optalr.flow_schedule(lambda t: jnp.exp(-scale * t), time_step)(3)

    np.testing.assert_allclose(rate(2.0, 0.1), 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    "profile", [lambda t: 1.0 + t, lambda t: 1.0 + t**2, lambda t: -t, lambda t: jnp.nan * t]
)
def test_what_is_not_a_decay_is_refused(profile):
    with pytest.raises(ValueError, match="profile"):
        optalr.flow_schedule(profile, 0.1)
    with pytest.raises(ValueError, match="start"):
        optalr.flow_schedule(lambda t: 1.0 - t, 0.1, start=2.0)


@pytest.mark.parametrize(
    ("profile", "end"),
    [
        (optalr.exponential_profile, 2.0),
        (optalr.linear_profile, 0.9),
        (optalr.power_profile(2.0), 2.0),
    ],
    ids=["exponential", "linear", "power"],
)
def test_small_steps_follow_the_profile(profile, end):
    time_step = 0.01
    num_updates = round(end / time_step)
    outputs = follow(optalr.flow_schedule(profile, time_step), num_updates)
    times = time_step * np.arange(num_updates + 1)
    expected = np.asarray(profile(jnp.asarray(times)))[:, None] * outputs[:1]
    scale = np.abs(outputs[0]).max()
    # Euler's method is of first order: its error is a small multiple of the step.
    np.testing.assert_allclose(outputs, expected, atol=2 * time_step * scale)


def test_the_decay_is_drawn(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    worst = decay.draw_decay(tmp_path / "decay.png")
    assert worst < 0.03
    assert (tmp_path / "decay.png").exists()
    (axes,) = figures[0].axes
    lines = axes.get_lines()
    profiles = [optalr.exponential_profile, optalr.linear_profile, optalr.power_profile(2.0)]
    assert len(lines) == 2 * len(profiles)
    for profile, band, dots in zip(profiles, lines[::2], lines[1::2], strict=True):
        np.testing.assert_allclose(band.get_ydata(), profile(jnp.asarray(band.get_xdata())))
        np.testing.assert_allclose(
            dots.get_ydata(), profile(jnp.asarray(dots.get_xdata())), atol=worst + 1e-6
        )
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["ρ = exp(−t)", "ρ = 1 − t", "ρ = (1 + t)⁻²"]
    assert "time" in axes.get_xlabel()
    assert axes.get_yscale() == "log"


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="profile"):
        optalr.flow_schedule(0.5, 0.1)
    with pytest.raises(ValueError, match="time_step"):
        optalr.flow_schedule(optalr.linear_profile, 0.0)
    with pytest.raises(ValueError, match="largest"):
        optalr.flow_schedule(optalr.linear_profile, 0.1, largest=0.0)
    with pytest.raises(ValueError, match="power"):
        optalr.power_profile(-1.0)
