import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from optalr import arguments


def test_interval_names_the_argument_the_value_and_the_remedy():
    with pytest.raises(ValueError, match=r"damping must lie in \[0, inf\], got -1\.0\. Try 1e-3\."):
        arguments.check_interval("damping", -1.0, 0.0, remedy="Try 1e-3.")
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        arguments.check_interval("decay", 1.0, 0.0, 1.0, open_high=True)
    with pytest.raises(ValueError, match="decay"):
        arguments.check_interval("decay", float("nan"), 0.0, 1.0)
    with pytest.raises(TypeError, match="damping must be a number"):
        arguments.check_interval("damping", "small")


def test_interval_lets_tracers_and_schedules_through():
    assert arguments.check_interval("rate", lambda count: count, 0.0) is None
    rate = jax.jit(lambda rate: arguments.check_interval("rate", rate, 0.0) or rate)
    assert rate(jnp.float32(-1)) == -1


@pytest.mark.parametrize("bad", [1.5, True, "two", float("inf")])
def test_count_refuses_what_is_not_whole(bad):
    with pytest.raises(TypeError, match="num_steps must be a whole number"):
        arguments.check_count("num_steps", bad)


def test_count_refuses_what_is_too_small():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        arguments.check_count("num_steps", 0)


def test_choice_lists_the_choices():
    with pytest.raises(ValueError, match="statistics must be one of 'signals', 'gradient'"):
        arguments.check_choice("statistics", "both", ("signals", "gradient"))


def test_a_missing_extra_names_itself_and_the_call_that_supplies_it():
    with pytest.raises(
        TypeError, match=r"edf needs the extra argument 'hessian'.*value_grad_and_extras"
    ):
        arguments.require_extra({}, "hessian", "edf")


@dataclasses.dataclass(frozen=True)
class Guards:
    ceiling: float | None = 1.0
    strict: bool = True


class Law(NamedTuple):
    grow: float = 2.0
    strict: bool = True


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (Guards, {"ceiling": 3.0}, Guards(3.0)),
        (Guards, {"ceiling": False, "strict": False}, Guards(None, False)),
        (Law, {"grow": 3.0, "strict": False}, Law(3.0, False)),
        (Law, {}, Law()),
        (Law, Law(5.0), Law(5.0)),
        (Law, None, None),
    ],
)
def test_a_mapping_stands_for_an_object_with_these_fields(kind, given, expected):
    assert arguments.from_fields("law", given, kind) == expected


def test_an_unknown_field_is_named():
    with pytest.raises(TypeError, match="law has no field 'grew'; its fields are grow, strict"):
        arguments.from_fields("law", {"grew": 3.0}, Law)
