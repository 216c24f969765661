"""Reading pickles of arrays without running anything that they may hold.

An ordinary unpickler calls whatever function the file names and takes whatever memory it announces.
This one knows the few names that arrays need, and stands in for them: what a file says of an array
is compared with the bytes that it brings before there is an array.
"""

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from optalr.experiments.errors import ExperimentError

# Kinds of numbers that data have: whole numbers with and without sign, and floating point.
_KINDS = "iuf"


def _text(value: Any) -> str:
    """Return text that a pickle of Python 2 holds as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


class _Dtype:
    """Stands in for a dtype: its name as ``numpy.dtype`` gets it, and its byte order."""

    def __init__(self, name: Any, *_: Any):
        self.name, self.order = _text(name), "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def real(self) -> np.dtype[Any]:
        """Return the dtype, if it is one of numbers."""
        # Two or three characters, such as u1: longer names are of texts and structures.
        if self.name[:1] not in _KINDS or len(self.name) > 3 or self.order not in "<>|=":
            raise ExperimentError(f"the pickle holds an array of {self.name!r}, not of numbers.")
        return np.dtype(f"{self.order}{self.name}")


class _Array:
    """Stands in for an array until its shape, dtype and bytes are known to agree."""

    def __init__(self, *_: Any):
        self.value = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, content = state
        found = dtype.real()
        counts = all(isinstance(n, int) and n >= 0 for n in shape)
        if not counts or math.prod(shape) * found.itemsize != len(content):
            raise ExperimentError(
                f"the pickle holds an array of shape {shape} with {len(content)} bytes, which do "
                "not agree: it is damaged."
            )
        order = "F" if by_columns else "C"
        self.value = np.frombuffer(content, found).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ExperimentError(f"the pickle asks for the encoding {encoding!r}: refused.")
    return text.encode("latin1")


# A file names the function by its place in the NumPy that wrote the file.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    # How Python 3 writes bytes in the protocols of Python 2.
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise ExperimentError(
            f"the pickle asks for {module}.{name}, which data has no use for: refused, nothing in "
            "it was run. Fetch the file from its official address."
        )


def load_pickle(name: str, content: bytes) -> dict[bytes, Any]:
    """Return the dict of a pickle that holds arrays, lists, numbers and strings only.

    Args:
      name: the file's name, for messages.
      content: the file's bytes.

    Returns:
      The dict; its keys are bytes, as in pickles of Python 2.

    Raises:
      ExperimentError: the pickle holds anything else, is cut short, or announces more than it has.
    """
    try:
        _check_places(content)
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except ExperimentError as error:
        raise ExperimentError(f"{name}: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ExperimentError(
            f"{name} is cut short or no pickle ({type(error).__name__}): fetch it again."
        ) from None
    if not isinstance(loaded, dict):
        raise ExperimentError(f"{name} holds no dictionary: it is not the file it should be.")
    # A pickle of Python 3 has keys of text, one of Python 2 of bytes; callers know the latter.
    return {
        k.encode() if isinstance(k, str) else k: v.value if isinstance(v, _Array) else v
        for k, v in loaded.items()
    }


def _check_places(content: bytes) -> None:
    """Raise where a pickle stores something at a place beyond its own length.

    The unpickler makes its table as long as the largest place, so eight bytes could ask for all of
    the memory. The walk itself reads no more than there is.
    """
    for opcode, place, _ in pickletools.genops(content):
        if "PUT" in opcode.name and isinstance(place, int) and place > len(content):
            raise ExperimentError("the pickle announces more than it holds: refused.")
