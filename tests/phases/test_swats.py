import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr


class NumpySwats:
    """Algorithm 1 of Keskar & Socher (2017), in float64, with the uncorrected averages."""

    def __init__(self, w, alpha=1e-3, b1=0.9, b2=0.999, eps=1e-8, tolerance=1e-9):
        self.w = np.array(w, np.float64)
        self.alpha, self.b1, self.b2, self.eps, self.tolerance = alpha, b1, b2, eps, tolerance
        self.m = np.zeros_like(self.w)
        self.a = np.zeros_like(self.w)
        self.k, self.average, self.rate, self.v = 0, 0.0, None, None

    def step(self, g):
        g = np.asarray(g, np.float64)
        if self.rate is not None:
            self.v = self.b1 * self.v + g
            self.w = self.w - (1 - self.b1) * self.rate * self.v
            return
        self.k += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.a = self.b2 * self.a + (1 - self.b2) * g**2
        m_hat, a_hat = self.m / (1 - self.b1**self.k), self.a / (1 - self.b2**self.k)
        p = -self.alpha * m_hat / (np.sqrt(a_hat) + self.eps)
        self.w = self.w + p
        if p @ g != 0:
            gamma = (p @ p) / -(p @ g)
            self.average = self.b2 * self.average + (1 - self.b2) * gamma
            corrected = self.average / (1 - self.b2**self.k)
            if self.k > 1 and abs(corrected - gamma) < self.tolerance:
                self.rate, self.v = corrected, np.zeros_like(self.w)


def gradients(problem, num_steps):
    """Gradient functions of the weights, one a step, in float64."""
    rng = np.random.default_rng(3)
    scales = np.array([1.0, 0.3, 3.0, 0.1])
    for k in range(num_steps):
        noise = rng.normal(size=4)
        if problem == "settling":  # towards a constant gradient, so that the projection converges
            yield lambda w, k=k, noise=noise: scales + noise * 0.8**k
        else:
            yield lambda w, noise=noise: scales * w + noise


@pytest.mark.parametrize(("problem", "tolerance"), [("settling", 3e-4), ("noisy", 2e-3)])
@pytest.mark.parametrize("x64", [False, True])
def test_against_numpy_step_by_step_through_the_switch(problem, tolerance, x64):
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        settings = {"b1": 0.9, "b2": 0.99, "tolerance": tolerance}
        reference = NumpySwats([1.0, -2.0, 0.5, 3.0], 0.03, **settings)
        tx = optalr.swats(0.03, **settings)
        params = jnp.array([1.0, -2.0, 0.5, 3.0], dtype)
        state, update = tx.init(params), jax.jit(tx.update)
        switched = []
        for gradient in gradients(problem, 80):
            g = gradient(reference.w)  # the same gradient for both: errors do not feed back
            updates, state = update(jnp.asarray(g, dtype), state, params)
            params = optax.apply_updates(params, updates)
            reference.step(g)
            np.testing.assert_allclose(params, reference.w, rtol=2e-5, atol=2e-6)
            assert bool(state.phase) == (reference.rate is not None)
            switched.append(reference.rate is not None)
        assert 2 < switched.index(True) < 70, "the case must exercise both phases"
        np.testing.assert_allclose(state.learning_rate, reference.rate, rtol=1e-5)
        assert int(state.steps_since_switch) == 79 - switched.index(True)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_steady_projection_is_taken_at_once(size):
    # A constant gradient: Adam steps by α in every coordinate, so γ = α P / Σ|g|, from the start.
    g = size * jnp.array([1.0, -2.0, 5.0])
    tx = optalr.swats(1e-3)
    params, state, update = jnp.zeros(3), tx.init(jnp.zeros(3)), jax.jit(tx.update)
    for _ in range(2):
        assert float(state.phase) == 0
        _, state = update(g, state, params)
    assert float(state.phase) == 1
    np.testing.assert_allclose(state.projected_rate, 1e-3 * 3 / (8 * size), rtol=1e-5)


def test_without_a_switch_it_is_adam():
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    swats = optalr.swats(lambda k: 0.1 / (1 + k), tolerance=0.0)
    adam = optax.adam(lambda k: 0.1 / (1 + k))
    ours, theirs = params, params
    state, adam_state, update = swats.init(params), adam.init(params), jax.jit(swats.update)
    for _ in range(10):
        updates, state = update(jax.tree.map(lambda x: x**3, ours), state, ours)
        ours = optax.apply_updates(ours, updates)
        updates, adam_state = adam.update(jax.tree.map(lambda x: x**3, theirs), adam_state)
        theirs = optax.apply_updates(theirs, updates)
    assert float(state.phase) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours, theirs)


def test_the_second_phase_has_a_schedule_with_its_own_clock():
    tx = optalr.swats(0.1, second_scale=lambda steps: 0.5**steps)
    g, rates = jnp.array([1.0, 3.0]), []
    state, update = tx.init(g), jax.jit(tx.update)
    for _ in range(5):
        _, state = update(g, state)
        rates.append(round(float(state.learning_rate), 6))
    assert rates == [0.1, 0.1, 0.05, 0.025, 0.0125]


def test_a_zero_gradient_moves_nothing_and_never_switches():
    tx = optalr.swats(0.1)
    params = jnp.ones(3)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(jnp.zeros(3), state, params)
        assert not np.any(updates)
    assert float(state.phase) == 0
    assert np.isfinite(state.projected_rate)


def test_arguments_are_refused_at_construction():
    for name, value in {"learning_rate": -1.0, "b1": 1.0, "b2": 0.0, "eps": -1.0}.items():
        with pytest.raises(ValueError, match=name):
            optalr.swats(**{name: value})
    with pytest.raises(ValueError, match="tolerance"):
        optalr.swats(tolerance=-1.0)
    with pytest.raises(TypeError, match="second_scale"):
        optalr.swats(second_scale=0.1)
