"""How the command line ends: with one line, and an exit code that says why."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

from optalr.experiments.errors import (
    ExperimentError,
    LostProcessError,
    TrainingDivergedError,
    cause_of,
)
from optalr.experiments.processes import joined, leave
from optalr.experiments.records.signals import EXIT_BASE, Interruption

EXIT_MISTAKE = 2
EXIT_DIVERGED = 3
EXIT_LOST = 4


@contextlib.contextmanager
def one_line_endings() -> Iterator[None]:
    """Turn an error into a line on standard error and an exit code."""
    try:
        yield
    except TrainingDivergedError as error:
        _fail(error, EXIT_DIVERGED)
    except LostProcessError as error:
        _fail(error, EXIT_LOST)
    except ExperimentError as error:
        _fail(error, EXIT_MISTAKE)
    except Interruption as error:
        print(f"\noptalr: {error}", file=sys.stderr)
        sys.exit(EXIT_BASE + error.number)
    except KeyboardInterrupt:
        print("\noptalr: interrupted; go on with `optalr resume FOLDER`.", file=sys.stderr)
        sys.exit(EXIT_BASE + signal.SIGINT)
    except BrokenPipeError:
        # The reader (head, less) has gone; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(ExperimentError(f"{place}{cause_of(error)}."), EXIT_MISTAKE)
    except ModuleNotFoundError as error:
        if (error.name or "optalr").startswith("optalr"):
            raise
        remedy = f"this needs {error.name}: pip install 'optalr[experiments]'"
        _fail(ExperimentError(remedy), EXIT_MISTAKE)
    except Exception:
        if not joined():
            raise
        # At its end Python would wait for the others, which wait for this process.
        traceback.print_exc()
        leave(1)


def _fail(error: ExperimentError, code: int) -> None:
    print(f"optalr: error: {error}", file=sys.stderr)
    if joined() and not error.shared:
        leave(code)
    sys.exit(code)
