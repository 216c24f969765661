"""Files, functions and folders stay small enough to be read at once.

The exceptions may only shrink: whoever mends one takes it off its list, and a new one fails.
"""

import collections

import optalr
from optalr import linalg
from tests.syntax import Function, functions, package

MAX_MODULES = 12  # a folder, besides its ``__init__``
MAX_LINES = 300  # a file
MAX_CODE = 40  # code lines of a function: no blanks, comments and docstrings
MAX_POSITIONAL = 3  # parameters of a function that may be passed by position

LONG_FILES: set[str] = set()
# A factory counts with the functions that it defines and returns.
LONG_FUNCTIONS: set[str] = set()
# How many functions of a room take more than ``MAX_POSITIONAL``. Every factory checks by
# ``check_interval("decay", decay, 0, 1)``; a branch is ``update_when(due, fold, state, batch)``.
CROWDED = {"arguments": 2, "states": 1}

PUBLIC = {*optalr.__all__, *linalg.__all__}


def every_function(*, nested: bool) -> list[Function]:
    return [f for module in package().values() for f in functions(module, nested=nested)]


def test_no_folder_is_crowded():
    modules = collections.Counter(m.folder for m in package().values() if not m.is_door)
    assert not {folder: n for folder, n in modules.items() if n > MAX_MODULES}


def test_no_file_is_long():
    lengths = {m.name: m.path.read_text().count("\n") for m in package().values()}
    assert {name for name, lines in lengths.items() if lines > MAX_LINES} == LONG_FILES


def test_no_function_is_long():
    long = {f.name: f.num_lines for f in every_function(nested=True) if f.num_lines > MAX_CODE}
    assert set(long) == LONG_FUNCTIONS, long


def test_few_parameters_are_positional():
    """Public functions are exempt, since their callers rely on them.

    So are functions inside functions: jax and optax say what these are called with.
    """
    crowded = collections.defaultdict(list)
    for function in every_function(nested=False):
        if len(function.positional) > MAX_POSITIONAL:
            name = function.name
            if name.rpartition(".")[2] not in PUBLIC and not name.startswith(
                "optalr.experiments.cli."  # tyro makes options of them
            ):
                crowded[name.split(".")[1]].append(f"{name}: {len(function.positional)}")
    assert {room: len(names) for room, names in crowded.items()} == CROWDED, dict(crowded)
