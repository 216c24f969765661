"""What is of no use is refused where it is passed, by the name of its argument."""

import inspect
import operator

import optax
import pytest

import optalr

SOFTMAX = {"loss": "softmax", "num_classes": 3}
# The least that each factory can be called with.
LEAST = {
    "tso_alra": {"learning_rate": 0.1},
    "untuned": {"total_steps": 100},
    "learned_rate_sgd": {"initial_rate": 0.1},
    "learned_rate_then": {
        "second": optax.sgd,
        "initial_rate": 0.1,
        "phase": optalr.switch_at(2),
    },
    "lipschitz_sgd": SOFTMAX,
    "lipschitz_adam": SOFTMAX,
    "edf": {"learning_rate": 0.1},
    "classical": {"rule": "sgd", "learning_rate": 0.1},
    "swats": {},
    "scale_by_kronecker": {},
    "scale_by_block_diagonal": {},
    "scale_by_full_matrix": {},
    "scale_by_krylov_flow": {},
    "scale_by_learned_rate": {"initial_rate": 0.1},
    "scale_by_lipschitz_rate": SOFTMAX,
    "scale_by_local_gains": {},
    "scale_by_recorded_rate": {"learning_rate": 0.1},
    "add_learned_decay": {"initial_decay": 0.1},
    "accelerate_by_nesterov_flow": {},
    "guard": {"inner": optax.sgd(0.1)},
    "two_stage": {"first": optax.sgd(0.1), "second": optax.sgd(0.1), "phase": 0.5},
    "paper.tso_alra": {"learning_rate": 0.1},
    "paper.learned_rate_sgd": {"initial_rate": 0.1},
    "paper.lipschitz_sgd": {**SOFTMAX, "steps_per_epoch": 2},
    "paper.edf": {"learning_rate": 0.1},
    "paper.swats": {},
    "paper.amsgrad": {"learning_rate": 0.1},
}
# Any string may be the name of an extra, or the key path of a layer.
ANY_NAME = {"probe", "last_layer"}
ARGUMENTS = [
    (name, parameter.name)
    for name in LEAST
    for parameter in inspect.signature(operator.attrgetter(name)(optalr)).parameters.values()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=".".join)
def test_what_is_of_no_use_is_refused_by_the_name_of_its_argument(name, argument):
    factory = operator.attrgetter(name)(optalr)
    factory(**LEAST[name])
    for useless in (object(), "none"):
        if useless == "none" and argument in ANY_NAME:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
            factory(**{**LEAST[name], argument: useless})


def test_gains_may_be_a_mapping_of_their_arguments():
    gains = optalr.scale_by_local_gains(0.2, max_gain=3.0)
    one, two = (
        optalr.classical("sgd", 0.1, gains=g) for g in (gains, {"beta": 0.2, "max_gain": 3})
    )
    for tx in (one, two):
        state, params = tx.init({"w": 1.0}), {"w": 1.0}
        for _ in range(9):
            updates, state = tx.update({"w": 0.5}, state, params)
        assert float(updates["w"]) == pytest.approx(-0.1 * 2.6 * 0.5)  # gain 1 + 8 · 0.2


def test_momentum_of_none_is_written_as_none_or_zero():
    with pytest.raises(TypeError, match=r"momentum must be a number, got 'none'. None is for none"):
        optalr.tso_alra(1e-2, momentum="none")
    optalr.tso_alra(1e-2, momentum=None)
    optalr.tso_alra(1e-2, momentum=0)
