"""optalr beside its peers: each in an environment of its own, each with the same tuning budget.

    python benchmarks/peers.py                          # environments, missing runs, the page
    python benchmarks/peers.py --problems all           # all ten problems, not the four of DEFAULT
    python benchmarks/peers.py --problems digits_mlp --peers adam kfac untuned
    python benchmarks/peers.py --budget-hours 0.5       # stops there; the next call goes on
    python benchmarks/peers.py --report                 # the page from stored runs alone

Every method has the same budget: twelve settings (``peers_parts/methods.py``), chosen by the final
validation loss on one seed, then three seeds. The problems are those of ``untuned.py``. kfac-jax,
psgd-jax and python-somax run in virtual environments with pinned versions
(``peers_parts/environments.py``), and so do ours and optax's methods; all have the same jax. They
are made at the first call, in ``.peers`` or where $OPTALR_PEERS or ``--environments`` says.

One process at a time makes all runs of a method on a problem, on one core. Each run is stored once
it has ended, in ``results/peers``, so the bench may be stopped at any time, and goes on where it
was. The page is ``results/peers.md``.
"""

import argparse
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.peers_parts import children, environments  # noqa: E402
from benchmarks.peers_parts.worker import Request  # noqa: E402
from benchmarks.untuned_parts.storing import Store  # noqa: E402

FOLDER = ROOT / "benchmarks" / "results" / "peers"
DEFAULT = ("digits_mlp", "diabetes_mlp", "fashion_cnn", "python_transformer")
ALL = "all"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from benchmarks.peers_parts.methods import METHODS
    from benchmarks.untuned_parts.problems import PROBLEMS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def names(option: str, valid: Iterable[str], **more: object) -> None:
        parser.add_argument(option, nargs="+", choices=valid, metavar="NAME", **more)

    about = f"{ALL}, or some of: {', '.join(PROBLEMS)}"
    names("--problems", (*PROBLEMS, ALL), default=DEFAULT, help=about)
    names("--peers", METHODS, default=list(METHODS), help=f"methods, of: {', '.join(METHODS)}")
    names("--again", METHODS, default=[], help="methods whose runs of the problems are dropped")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--budget-hours", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="folder of the runs")
    parser.add_argument(
        "--environments",
        type=pathlib.Path,
        default=environments.folder(),
        help=f"folder of the virtual environments; also by ${environments.VARIABLE}",
    )
    args = parser.parse_args(arguments)
    if ALL in args.problems:
        args.problems = list(PROBLEMS)
    if args.report and args.again:
        parser.error("--again drops runs and --report makes none: give one of them")
    return args


def run_all(args: argparse.Namespace) -> None:
    """Make all runs that are not stored yet, problem by problem, until the budget is spent."""
    from benchmarks.peers_parts.methods import METHODS

    deadline = time.monotonic() + 3600 * args.budget_hours
    for problem in args.problems:
        Store(problem, args.out).forget(args.again)
    groups = [(problem, METHODS[name]) for problem in args.problems for name in args.peers]
    for number, (problem, method) in enumerate(groups, 1):
        print(f"[{number} of {len(groups)}] {problem}, {method.name}", flush=True)
        seeds, out = list(args.seeds), str(args.out.resolve())
        request = Request(problem, method.name, seeds, out, children.made_by(method))
        children.run(request, method, args.environments, deadline=deadline)
        if time.monotonic() > deadline:
            print("the budget is spent: the same command goes on from here")
            return


def main() -> None:
    args = parse()
    from benchmarks.peers_parts import report
    from benchmarks.untuned_parts.problems import require_data

    if not args.report:
        require_data(args.problems)
        # Asked to end, it ends its child first.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            run_all(args)
        except KeyboardInterrupt:
            print("stopped: the same command goes on from here")
            sys.exit(130)
    print(report.write(args.out))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
