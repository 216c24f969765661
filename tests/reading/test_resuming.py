import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import optalr
from optalr.reading.resuming import ConfigurationChangedWarning

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.2])}


def plateau():
    schedule = optalr.switch_on_plateau(patience=2)
    return optalr.two_stage(optax.adam(0.1), optax.sgd(0.1, momentum=0.9), schedule)


def blend():
    return optalr.two_stage(
        optalr.scale_by_recorded_rate(optalr.schedules.inverse_decay(0.1, 0.5)),
        optalr.classical("momentum", optalr.schedules.halving(0.1, 2)),
        optalr.blend_between(2, 5),
        momentum="restart",
    )


def handed_over():
    return optalr.two_stage(
        optax.sgd(0.1, momentum=0.9),
        optax.sgd(0.01, momentum=0.9),
        optalr.switch_at(4),
        momentum="hand_over",
    )


def swats():
    return optalr.swats(0.1, tolerance=3e-2, second_scale=lambda t: 0.9**t)


def measurement(t):
    return jnp.float32(1.0 if t % 2 else jnp.nan)


@pytest.mark.parametrize("make", [plateau, blend, handed_over, swats])
def test_any_step_of_any_phase_is_resumed_bit_for_bit(make, tmp_path):
    tx = make()

    @jax.jit
    def step(params, state, value):
        grads = jax.tree.map(lambda x: x**3 + 0.1, params)
        updates, state = tx.update(grads, state, params, validation_value=value)
        return optax.apply_updates(params, updates), state

    history = [(PARAMS, tx.init(PARAMS))]
    for t in range(8):
        history.append(step(*history[-1], measurement(t)))
    phases = {float(optalr.metrics(state)["phase"]) for _, state in history}
    assert {0.0, 1.0} <= phases
    target = jax.eval_shape(lambda: history[0])
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        for t, saved in enumerate(history):
            checkpointer.save(tmp_path / str(t), saved)
        checkpointer.wait_until_finished()
        for t in range(len(history)):
            restored = checkpointer.restore(tmp_path / str(t), target)
            for later in range(t, min(t + 2, 8)):
                restored = step(*restored, measurement(later))
                jax.tree.map(np.testing.assert_array_equal, restored, history[later + 1])


def test_a_phase_set_by_hand_and_a_release_survive_a_resume(tmp_path):
    tx = plateau()
    state = optalr.set_phase(tx.init(PARAMS), 1.0)
    state = optalr.release_first_stage(state)
    target = optalr.release_first_stage(optalr.set_phase(tx.init(PARAMS), 1.0))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: target))
    for current in (state, restored):
        _, after = tx.update(PARAMS, current, PARAMS, validation_value=jnp.nan)
        assert float(after.hyperparams["phase"]) == 1


@dataclasses.dataclass
class Settings:
    rate: float
    betas: tuple = (0.9, 0.999)


def test_changes_are_named():
    params = jnp.ones(3)
    before = optalr.configuration(
        optimizer=Settings(0.1), schedule=optax.cosine_decay_schedule, data=np.arange(4),
        state=jax.eval_shape(optax.adam(0.1).init, params),
    )  # fmt: skip
    assert json.loads(json.dumps(before)) == before
    after = optalr.configuration(
        optimizer=Settings(0.2, (0.9, 0.99)), schedule=optax.cosine_decay_schedule,
        data=np.arange(4)[::-1], state=jax.eval_shape(optax.adam(0.1).init, jnp.ones(4)), seed=1,
    )  # fmt: skip
    with pytest.warns(ConfigurationChangedWarning, match=r"optimizer\.rate: 0\.1 -> 0\.2"):
        lines = optalr.warn_if_changed(before, after)
    names = [line.split(":")[0] for line in lines]
    assert names == [
        "optimizer.rate",
        "optimizer.betas.1",
        "data",
        "state.0.mu",
        "state.0.nu",
        "seed",
    ]


def test_nothing_is_said_where_nothing_changed():
    settings = optalr.configuration(optimizer=Settings(0.1), weights=jnp.ones(3))
    assert optalr.warn_if_changed(settings, optalr.configuration(**{
        "optimizer": Settings(0.1), "weights": jnp.ones(3),
    })) == []  # fmt: skip
