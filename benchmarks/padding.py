"""Whether padding matrices of unequal sizes into one batch pays: compile and run time.

    python benchmarks/padding.py

The matrices are the factors of a 256-wide network of ten layers with joint biases: 257 rows on the
input's side and 256 on the output's, and of five narrower layers, 120 rows and 128. Without padding
every size is a batch of its own. Times of a run are ratios to no padding, medians of alternating
rounds within one process.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from optalr.linalg import inverse_roots

SIZES = [257, 256] * 10 + [120, 128] * 5
PADDINGS = (0.0, 0.01, 0.1)


def matrices():
    rng = np.random.default_rng(0)
    made = []
    for n in SIZES:
        thin = rng.standard_normal((n, 2 * n)) * np.logspace(0, -1.5, n)[:, None]
        made.append((thin @ thin.T / (2 * n)).astype(np.float32))
    return made


def measure(method, rounds):
    stack, compiled, rows = matrices(), {}, {}
    for padding in PADDINGS:

        def roots(given, padding=padding):
            return [
                r.root for r in inverse_roots(given, damping=1e-3, method=method, padding=padding)
            ]

        start = time.perf_counter()
        compiled[padding] = jax.jit(roots).lower(stack).compile()
        rows[padding] = {"compile s": time.perf_counter() - start, "ms": []}
    for run in compiled.values():
        jax.block_until_ready(run(stack))
    for _ in range(rounds):
        for padding, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(stack))
            rows[padding]["ms"].append(1e3 * (time.perf_counter() - start))
    for padding in PADDINGS:
        row = rows[padding]
        pairs = zip(row["ms"], rows[0.0]["ms"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        batches = len({max(m for m in SIZES if m <= n * (1 + padding)) for n in SIZES})
        milliseconds = statistics.median(row["ms"])
        print(
            f"| {method} | {padding} | {batches} | {row['compile s']:.1f} | {milliseconds:.1f} "
            f"| {ratio:.2f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["eigh", "cholesky_polar"])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print("| method | padding | batches | compile s | ms | time / no padding |")
    print("|---|---|---|---|---|---|")
    for method in arguments.methods:
        measure(method, arguments.rounds)


if __name__ == "__main__":
    main()
