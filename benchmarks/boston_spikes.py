"""Where the spikes of the learned rate on Boston Housing come from: rounding, the rule, or both.

    python benchmarks/boston_spikes.py            # table into results/, picture into docs/images/

Linear regression by full-batch gradient descent with Newton's method on the rate, as in figures 1
and 2 of "Faster gradient descent via an adaptive learning rate": 400 districts to train on, raw
features, initial rate 1e-2, the bare rule with the floor of 1e-6. Its authors "cannot really
explain" why the loss spikes. Six runs tell the candidates apart:

  exact or differences  f', f'' exact or from the paper's five values at ε = 1e-5
  float32 or float64    only in the first does rounding matter
  lag or no lag         Newton's rule one step late is the method of Barzilai and Borwein; at once
                        it is steepest descent, which never raises the loss of a quadratic

The safeguards of ``optalr.RateSafeguards`` are compared with the bare rule from 40 random starts. A
single run says little: it may end in a spike or between two.

The data's column B is built on the assumption that racial segregation raises house prices: use it
to check optimizers, not to learn about houses.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

import optalr
from optalr.experiments.data.tabular import boston
from optalr.signals.ray import loss_along

matplotlib.use("agg")
HERE = pathlib.Path(__file__).parent
NUM_TRAIN, SPIKE = 400, 10.0
RUNS = {
    "exact, float64": ("exact", True, True),
    "differences, float64": ("finite_differences", True, True),
    "exact, float32": ("exact", False, True),
    "differences, float32": ("finite_differences", False, True),
    "exact, float64, no lag": ("exact", True, False),
    "exact, float32, no lag": ("exact", False, False),
}


def data(seed, dtype):
    raw = boston().train
    order = np.random.default_rng(seed).permutation(len(raw))
    parts = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return [(raw.x[i].astype(dtype), raw.y[i, 0].astype(dtype)) for i in parts]


def loss_fn(w, x, y):
    return jnp.mean((x @ w - y) ** 2)


SAFEGUARDS = {
    "bare rule": "off",
    "default safeguards": "on",
    "no step longer than 1 once the loss has risen": {"max_step": 1.0},
}


def spread(steps, seed, num_starts):
    """Return setting -> the training losses of every start and step, exact in float32, and cuts."""
    x, y = map(jnp.asarray, data(seed, np.float32)[0])
    keys = jax.random.split(jax.random.key(seed), num_starts)
    starts = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]) / x.shape[1] ** 0.5)(keys)
    evaluate = optalr.value_grad_and_extras(loss_fn)
    found = {}
    for name, safeguards in SAFEGUARDS.items():
        tx = optalr.learned_rate_sgd(1e-2, safeguards=safeguards)

        def step(carry, _, tx=tx):
            w, state = carry
            value, grads, extras = evaluate(w, x, y)
            updates, state = tx.update(grads, state, w, **extras)
            return (optax.apply_updates(w, updates), state), value

        def losses(w, tx=tx, step=step):
            return jax.lax.scan(step, (w, tx.init(w)), length=steps)[1]

        found[name] = np.asarray(jax.jit(jax.vmap(losses))(starts), np.float64)
    return found


def spread_table(found):
    """Return the quantiles of the losses at the end, and the largest rise in a step."""
    lines = [
        "| safeguards | loss at the end: lowest tenth | median | highest tenth | largest rise |",
        "|---|---|---|---|---|",
    ]
    for name, losses in found.items():
        low, middle, high = np.quantile(losses[:, -1], (0.1, 0.5, 0.9))
        rise = np.median((losses[:, 3:] / losses[:, 2:-1]).max(axis=1))
        lines.append(f"| {name} | {low:.3g} | {middle:.3g} | {high:.3g} | {rise:.2g} |")
    return "\n".join(lines)


def run(derivatives, double, lag, *, steps, seed):
    """Return per step: train and test loss, rate, and f'' by differences and exactly."""
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        train, test = jax.tree.map(jnp.asarray, data(seed, dtype))
        tx = optalr.learned_rate_sgd(1e-2, derivatives=derivatives, lag=lag, safeguards="off")
        evaluate = optalr.value_grad_and_extras(loss_fn)
        differences = optalr.FiniteDifferences(1e-5)

        def step(carry, _):
            w, state = carry
            value, grads, extras = evaluate(w, *train)
            rate = optalr.metrics(state)["next_rate"].astype(dtype)
            ray = loss_along(extras["value_fn"], w, grads)
            measured = {
                "train": value,
                "test": loss_fn(w, *test),
                "exact": optalr.ExactDerivatives().measure(ray, rate).curvature,
                "differences": differences.measure(ray, rate).curvature,
            }
            updates, state = tx.update(grads, state, w, **extras)
            measured["rate"] = optalr.metrics(state)["learning_rate"]
            return (optax.apply_updates(w, updates), state), measured

        w = jnp.zeros(train[0].shape[1], dtype)
        start = w, tx.init(w)
        measured = jax.jit(lambda s: jax.lax.scan(step, s, length=steps)[1])(start)
        return {name: np.asarray(values, np.float64) for name, values in measured.items()}


def best_loss(seed):
    (x, y), _ = data(seed, np.float64)
    return float(np.mean((x @ np.linalg.lstsq(x, y)[0] - y) ** 2))


def summarize(runs, floor):
    """Return name -> numbers, the first rise after the initial rate's own step left out."""
    rows = {}
    for name, found in runs.items():
        excess = np.maximum(found["train"] - floor, 1e-12)[2:]
        with np.errstate(invalid="ignore", over="ignore"):
            rises = excess[1:] / excess[:-1]
            error = np.abs(found["differences"] / found["exact"] - 1)
        alive = np.isfinite(found["train"])
        rows[name] = {
            "spikes": int(np.sum(rises > SPIKE)),
            "largest_rise": float(np.nanmax(rises)),
            "loss_at_end": float(found["train"][-1]),
            "lowest_loss": float(np.nanmin(found["train"])),
            "diverged_at": None if alive.all() else int(np.argmin(alive)),
            "median_error_of_differences": float(np.nanmedian(error)),
            "wrong_sign_of_differences": float(np.mean(found["differences"][alive] <= 0)),
        }
    return rows


def table(rows, floor):
    lines = [
        f"Least-squares optimum of the training loss: {floor:.3f}. A spike: the excess over it "
        f"grows more than {SPIKE:g} times in one step.",
        "",
        "| run | spikes | largest rise | lowest loss | loss at the end | "
        "error of f'' by differences | f'' <= 0 by differences |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lost = row["diverged_at"]
        end = f"{row['loss_at_end']:.4g}" if lost is None else f"NaN from step {lost}"
        lines.append(
            f"| {name} | {row['spikes']} | {row['largest_rise']:.3g} | {row['lowest_loss']:.4g} | "
            f"{end} | {row['median_error_of_differences']:.2g} | "
            f"{100 * row['wrong_sign_of_differences']:.0f} % |"
        )
    return "\n".join(lines)


def picture(runs, floor, path):
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True, sharey="row")
    for column, precision in enumerate(("float64", "float32")):
        for name, found in runs.items():
            if precision not in name:
                continue
            label = name.replace(f", {precision}", "")
            excess = np.maximum(found["train"] - floor, 1e-9)
            axes[0, column].semilogy(excess, label=label, lw=1)
            axes[1, column].semilogy(np.maximum(found["rate"], 1e-9), label=label, lw=1)
        found = runs[f"exact, {precision}"]
        error = np.abs(found["differences"] / found["exact"] - 1)
        axes[2, column].semilogy(np.maximum(error, 1e-17), ".", ms=3, color="black")
        axes[2, column].axhline(1.0, color="black", lw=0.5)
        axes[0, column].set_title(precision)
        axes[2, column].set_xlabel("step")
        axes[0, column].legend(fontsize="small")
    axes[0, 0].set_ylabel("train loss - optimum")
    axes[1, 0].set_ylabel("learning rate")
    axes[2, 0].set_ylabel("relative error of f''\nby differences, exact run")
    figure.suptitle("Boston Housing, Newton's method on the rate: spikes and their causes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--starts", type=int, default=40, help="random starts for the safeguards")
    parser.add_argument("--seed", type=int, default=0, help="which districts are held out")
    parser.add_argument(
        "--picture", type=pathlib.Path, default=HERE.parent / "docs/images/boston_spikes.png"
    )
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results/boston_spikes.json")
    args = parser.parse_args()
    floor = best_loss(args.seed)
    runs = {name: run(*setting, steps=args.steps, seed=args.seed) for name, setting in RUNS.items()}
    rows = summarize(runs, floor)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"jax": jax.__version__, "steps": args.steps, "seed": args.seed, "optimum": floor}
    args.out.write_text(json.dumps({"about": about, "results": rows}, indent=2) + "\n")
    report = table(rows, floor)
    report += f"\n\n{args.starts} random starts, exact, float32:\n\n"
    report += spread_table(spread(args.steps, args.seed, args.starts))
    args.out.with_suffix(".md").write_text(report + "\n")
    print(report)
    picture(runs, floor, args.picture)


if __name__ == "__main__":
    main()
