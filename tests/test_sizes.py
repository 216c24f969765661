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

LONG_FILES = {
    "optalr.experiments.configs.config",
    "optalr.experiments.studies.compare",
    "optalr.reading.geometry",
    "optalr.signals.tracing.layers",
    "optalr.signals.tracing.sites",
    "optalr.signals.tracing.views",
    "optalr.transforms.dense.full_matrix",
    "optalr.transforms.kronecker.transform",
    "optalr.transforms.learned_rate.transform",
    "optalr.transforms.lipschitz_rate.transform",
}
# A factory counts with the functions that it defines and returns.
LONG_FUNCTIONS = {
    "optalr.linalg.minres.recurrence._rotate",
    "optalr.linalg.roots.inverse_root.inverse_root",
    "optalr.phases.swats.swats",
    "optalr.phases.two_stage.two_stage",
    "optalr.reading.geometry.geodesic",
    "optalr.recipes.tso_alra.tso_alra",
    "optalr.signals.extras.value_grad_and_extras",
    "optalr.signals.tracing.convolutions.ConvSite.signals",
    "optalr.suggestion.suggest_learning_rate",
    "optalr.transforms.dense.block_diagonal.scale_by_block_diagonal",
    "optalr.transforms.dense.full_matrix._whole",
    "optalr.transforms.dense.full_matrix._windowed",
    "optalr.transforms.kronecker.memory.measure",
    "optalr.transforms.kronecker.transform.scale_by_kronecker",
    "optalr.transforms.krylov_flow.transform.scale_by_krylov_flow",
    "optalr.transforms.krylov_flow.transform.scale_by_krylov_flow.update_fn",
    "optalr.transforms.learned_rate.transform.scale_by_learned_rate",
    "optalr.transforms.lipschitz_rate.transform._measure",
    "optalr.transforms.lipschitz_rate.transform.scale_by_lipschitz_rate",
}
# How many functions of a room take more than ``MAX_POSITIONAL``.
CROWDED = {
    "arguments": 2,
    "experiments": 27,
    "linalg": 13,
    "phases": 4,
    "reading": 1,
    "signals": 45,
    "states": 1,
    "suggestion": 1,
    "transforms": 36,
}

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
