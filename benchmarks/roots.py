"""Time and accuracy of inverse square roots: methods by sizes by batch, on the backend at hand.

    python benchmarks/roots.py                                  # a sweep that fits two CPU cores
    python benchmarks/roots.py --sizes 1024 --batches 16        # blocks of 1024 on a GPU
    OPENBLAS_NUM_THREADS=1 taskset -c 0 python benchmarks/roots.py --clock cpu  # a busy machine

Every method is compared with a plain batched ``jnp.linalg.eigh`` and one product (no residual, no
scaling, no check), in alternation within one process: a row's ratio is the median over rounds of
its time by the plain one's in the same round, so that a busy machine disturbs both alike. Writes a
table (Markdown and CSV) and a picture under ``benchmarks/results/``.
"""

import argparse
import csv
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from optalr.linalg import inverse_root

matplotlib.use("agg")
from matplotlib import pyplot as plt

METHODS = {
    "plain eigh": None,
    "eigh": {"method": "eigh"},
    "coupled Newton 2": {"method": "coupled_newton", "order": 2},
    "coupled Newton 3": {"method": "coupled_newton", "order": 3},
    "Cholesky + polar": {"method": "cholesky_polar"},
    "refreshed basis": {"method": "eigenbasis", "tolerance": 1e3},
    "auto": {"method": "auto"},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COLUMNS = (
    *("condition", "n", "batch", "method", "ms (median)", "ms (best)", "time / plain eigh"),
    *("residual", "steps", "fell back", "compile s"),
)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--conditions", type=float, nargs="+", default=[1e2, 1e6])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--max-rows", type=int, default=2048, help="skip batch·n above this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20.0, help="limit for a cell's rounds")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: this process's processor time, for a busy machine (pin it to one core)",
    )
    parser.add_argument("--output", type=pathlib.Path, default=None)
    return parser.parse_args()


def random_stack(batch, n, condition):
    """Return matrices with eigenvalues spread evenly in the logarithm, and slightly moved ones."""
    rng = np.random.default_rng(0)
    stacks = []
    for _ in range(2):
        basis, _ = np.linalg.qr(rng.standard_normal((batch, n, n)))
        values = np.geomspace(1, 1 / condition, n)
        stacks.append((basis * values) @ np.swapaxes(basis, -1, -2))
    moved = 0.99 * stacks[0] + 0.01 * stacks[1]
    return stacks[0].astype(np.float32), moved.astype(np.float32)


def plain_eigh(matrix):
    values, vectors = jnp.linalg.eigh(matrix)
    inverse = 1 / jnp.sqrt(values)
    return jnp.matmul(
        vectors * inverse[..., None, :],
        jnp.swapaxes(vectors, -1, -2),
        precision=jax.lax.Precision.HIGHEST,
    )


def compiled_methods(names, stack, before):
    """Return name -> (call, compile seconds); every call takes no argument."""
    basis = jnp.linalg.eigh(before)[1]
    calls = {}
    for name in names:
        options = METHODS[name]
        if options is None:
            function, arguments = plain_eigh, (stack,)
        elif name == "refreshed basis":
            # The basis of a matrix that has since moved by one percent.
            function = lambda m, q, o=options: inverse_root(m, basis=q, **o)  # noqa: E731
            arguments = (stack, basis)
        else:
            function, arguments = lambda m, o=options: inverse_root(m, **o), (stack,)
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        jax.block_until_ready(compiled(*arguments))
        calls[name] = (lambda c=compiled, a=arguments: jax.block_until_ready(c(*a))), seconds
    return calls


def measure_cell(names, cell, arguments):
    """Yield a row a method for one condition, size and batch."""
    condition, n, batch = cell
    before, stack = (jnp.asarray(s) for s in random_stack(batch, n, condition))
    calls = compiled_methods(names, stack, before)
    times = {name: [] for name in names}
    clock = CLOCKS[arguments.clock]
    deadline = time.perf_counter() + arguments.seconds
    while len(times[names[0]]) < arguments.rounds:
        for name in names:
            start = clock()
            calls[name][0]()
            times[name].append(clock() - start)
        if time.perf_counter() > deadline and len(times[names[0]]) >= 3:
            break
    exact = np.asarray(stack, np.float64)
    for name in names:
        result = calls[name][0]()
        root = np.asarray(getattr(result, "root", result), np.float64)
        residual = np.linalg.norm(root @ exact @ root - np.eye(n), axis=(-2, -1)) / np.sqrt(n)
        ratio = np.median(np.divide(times[name], times[names[0]]))
        yield {
            "condition": f"{condition:.0e}",
            "n": n,
            "batch": batch,
            "method": name,
            "ms (median)": f"{1e3 * np.median(times[name]):.2f}",
            "ms (best)": f"{1e3 * np.min(times[name]):.2f}",
            "time / plain eigh": f"{ratio:.2f}",
            "residual": f"{residual.max():.1e}",
            "steps": int(np.max(getattr(result, "num_steps", 1))),
            "fell back": int(np.sum(getattr(result, "fell_back", 0))),
            "compile s": f"{calls[name][1]:.2f}",
        }


def table(rows):
    cells = [COLUMNS, *([str(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def picture(rows, path, title):
    """Draw time by plain eigh's and residual against size, one column a condition and batch."""
    cells = sorted({(row["condition"], row["batch"]) for row in rows})
    figure, axes = plt.subplots(
        2, len(cells), figsize=(4 * len(cells) + 1, 7), squeeze=False, sharex=True
    )
    for column, (condition, batch) in enumerate(cells):
        for row_axes, key in zip(axes, ("time / plain eigh", "residual"), strict=True):
            for name in dict.fromkeys(row["method"] for row in rows):
                points = [
                    (row["n"], float(row[key]))
                    for row in rows
                    if (row["condition"], row["batch"], row["method"]) == (condition, batch, name)
                ]
                row_axes[column].loglog(*zip(*points, strict=True), "o-", label=name, markersize=3)
            row_axes[column].set_ylabel(key)
            row_axes[column].grid(alpha=0.3)
        axes[0, column].set_title(f"condition {condition}, batch {batch}")
        axes[1, column].set_xlabel("rows")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    arguments = parse_arguments()
    names = list(dict.fromkeys(["plain eigh", *arguments.methods]))
    device = jax.devices()[0]
    title = (
        f"jax {jax.__version__} on {device.platform} ({device.device_kind}, {os.cpu_count()} "
        f"CPU cores, {platform.machine()}), float32, {arguments.clock} time"
    )
    print(title)
    folder = pathlib.Path(__file__).parent / "results"
    output = arguments.output or folder / f"roots-{device.platform}"
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for condition in arguments.conditions:
        for n in arguments.sizes:
            for batch in arguments.batches:
                if n * batch > arguments.max_rows and len(arguments.batches) > 1:
                    continue
                cell = list(measure_cell(names, (condition, n, batch), arguments))
                rows += cell
                print(table(cell), flush=True)
                write(rows, output, title)
    picture(rows, output.with_suffix(".png"), title)
    print(f"wrote {output}.md, .csv and .png")


def write(rows, output, title):
    """Write the table so far: a long sweep that is cut short leaves what it measured."""
    with open(output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    notes = f"# Inverse square roots\n\n{title}{load}. By `benchmarks/roots.py`.\n\n"
    output.with_suffix(".md").write_text(notes + table(rows) + "\n")


if __name__ == "__main__":
    main()
