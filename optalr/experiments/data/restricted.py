"""Reading pickles of arrays without running anything else that they may hold.

An ordinary unpickler calls whatever function the file names. This one knows the few that arrays
need and refuses all others.
"""

import io
import pickle
from typing import Any

import numpy as np

from optalr.experiments.errors import ExperimentError

# The function that rebuilds an array. NumPy has moved it to another module, so it is taken from an
# array instead of being imported by name.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)


# A file names the function by its place in the NumPy that wrote the file.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
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
      ExperimentError: the pickle holds anything else, or is cut short.
    """
    try:
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
    return {k.encode() if isinstance(k, str) else k: v for k, v in loaded.items()}
