"""The programs of the page "Many devices" run, one after the other, on eight simulated devices."""

import pathlib
import re

import jax
import pytest

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "devices.md"


@pytest.mark.slow
def test_the_programs_of_the_page_run():
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(programs) == 5
    names = {}
    # The page's code broadcasts as plain NumPy code does; the suite's setting forbids that.
    with jax.numpy_rank_promotion("allow"):
        for number, program in enumerate(programs):
            exec(compile(program, f"program {number} of the page", "exec"), names)
    assert names["restored"] is not None
