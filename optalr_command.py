"""The command ``optalr``, before anything of it is imported.

It stands outside of the package, whose import brings jax and takes a second. So a signal is
answered from the first moment on, and what is not installed is named in one line.
"""

import os
import signal
import sys
from typing import Any

EXIT_MISTAKE = 2


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    # Until a run begins to write, a signal can end the process at any moment.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        from optalr.experiments.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("optalr"):
            raise
        print(
            f"optalr: error: the command line needs {error.name}, which is not installed: "
            "pip install 'optalr[experiments]'",
            file=sys.stderr,
        )
        sys.exit(EXIT_MISTAKE)
    run()


def _leave(number: int, frame: Any) -> None:
    os.write(2, b"\noptalr: interrupted.\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
