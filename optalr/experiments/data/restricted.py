"""Reading pickles of arrays without running what else they may hold."""

import io
import pickle
from typing import Any

import numpy as np

from optalr.experiments.errors import ExperimentError

# What an array pickles to, found without naming numpy's internals, whose place has moved.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # Bytes, as Python 3 writes them in the protocols of Python 2.
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
    """Return the dict of a pickle that holds arrays, lists, numbers and strings, and nothing else.

    Raises:
      ExperimentError: anything else in it, or a file that is cut short.
    """
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except ExperimentError as error:
        raise ExperimentError(f"{name}: {error}") from None
    except Exception as error:
        # A damaged pickle can raise nearly anything.
        raise ExperimentError(
            f"{name} is cut short or no pickle ({type(error).__name__}): fetch it again."
        ) from None
    if not isinstance(loaded, dict):
        raise ExperimentError(f"{name} holds no dictionary: it is not the file it should be.")
    return {k.encode() if isinstance(k, str) else k: v for k, v in loaded.items()}
