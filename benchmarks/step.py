"""What a training step costs: TSO-ALRA beside optax's Adam and SGD, before and after its switch.

    python benchmarks/step.py                     # all models, a table, and JSON into results/
    python benchmarks/step.py --quick --models mlp

A step is evaluation, update and ``apply_updates``, compiled as one program with its memory donated.
TSO-ALRA takes signals every 10 and roots every 100 steps. Instead of averaging a hundred noisy
steps, its three kinds (plain, with signals, with signals and roots) are timed apart, each by
alternating with the Adam step within one process, and put together by how often they occur:

    amortized = 0.90 plain + 0.09 signals + 0.01 refresh

Columns (times are ratios to Adam's step, medians of pairs; wall and processor time):

  plain, signals, refresh   the three kinds of step
  amortized                 as above
  over_floor                amortized time / time of a step that has the flops of its own arithmetic
                            at the speed of Adam's step: gradient, products of the update, Gram
                            matrices and eigendecompositions (``20 (m³ + n³)``), by their frequency
  static                    phase 1 after ``release_first_stage``, over ``optax.sgd``
  traced                    phase 1 with the phase traced, over ``optax.sgd``
  somax                     a step of python-somax's ``sgn_ce``, where it is installed

kfac-jax needs another jax: ``signals_kfac_jax.py`` times its step. psgd-jax is left out: its 0.2.9
imports private parts of optax that 0.2.8 no longer has.

Signals are sampled as in ``signals.py``: one example in ``--every``, ``--positions`` positions.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from signals import RESULTS, make, problems, table

import optalr

try:
    import somax
except ImportError:
    somax = None

SIGNALS_EVERY, ROOTS_EVERY = 10, 100
FREQUENCIES = {"plain": 0.90, "signals": 0.09, "refresh": 0.01}


def seconds(run):
    """Return wall and processor time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


class Stepper:
    """A compiled step that carries its own parameters and state."""

    def __init__(self, name, tx, evaluate, *, prepare=lambda state: state, flag=None):
        loss_fn, params, batch = make(name)
        evaluate = evaluate(loss_fn)
        tx = optax.with_extra_args_support(tx)
        self.force, self.batch = lambda state: state, batch

        def step(params, state, flag, batch):
            (loss, _), grads, extras = evaluate(params, *batch, flag)
            updates, state = tx.update(grads, state, params, **extras)
            return optax.apply_updates(params, updates), state, loss

        self.params, self.state = params, prepare(tx.init(params))
        self.flag = flag
        static = (2,) if isinstance(flag, bool) or flag is None else ()
        jitted = jax.jit(step, donate_argnums=(0, 1), static_argnums=static)
        lowered = jitted.lower(self.params, self.state, flag, batch).compile()
        cost = lowered.cost_analysis()
        self.flops = (cost[0] if isinstance(cost, list) else cost)["flops"]
        self.compiled = (lambda p, s, _, b: lowered(p, s, b)) if static else lowered

    def __call__(self):
        self.state = self.force(self.state)
        self.params, self.state, loss = self.compiled(
            self.params, self.state, self.flag, self.batch
        )
        jax.block_until_ready((self.params, self.state, loss))


def plain_gradient(loss_fn):
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def evaluate(params, *rest):
        value, grads = gradient(params, *rest[:-1])
        return value, grads, {}

    return evaluate


def with_signals(every, positions):
    def build(loss_fn):
        evaluate = optalr.value_grad_and_extras(
            loss_fn, has_aux=True, every=every, max_positions=positions
        )
        return lambda params, *rest: evaluate(params, *rest[:-1], signals=rest[-1])

    return build


def edit(change):
    """Return a function that edits every ``KroneckerState`` in a state."""

    def is_it(node):
        return hasattr(node, "wants_signals") and hasattr(node, "root_age")

    def one(node):
        return change(node) if is_it(node) else node

    return lambda state: jax.tree.map(one, state, is_leaf=is_it)


def late(kind):
    """Put a state where the next update is of this kind, long after the warm-up."""

    def change(state):
        measures = kind != "plain"
        return state._replace(
            count=jnp.int32(10**6),
            signal_age=jnp.int32(SIGNALS_EVERY if measures else 1),
            root_age=jnp.int32(ROOTS_EVERY if kind == "refresh" else 1),
            num_refreshes=jnp.maximum(state.num_refreshes, 1),
            measurements=jnp.int32(10**4),
            wants_signals=jnp.bool_(measures),
        )

    return edit(change)


def ratios(pairs):
    """Return the medians of second over first for both clocks, and of the first's seconds."""
    wall = statistics.median(b[0] / a[0] for a, b in pairs)
    processor = statistics.median(b[1] / a[1] for a, b in pairs)
    return wall, processor, statistics.median(a[0] for a, _ in pairs)


def alternate(first, second, pairs):
    for run in (first, second):
        run()
    return ratios([(seconds(first), seconds(second)) for _ in range(pairs)])


def layer_flops(name, every, positions):
    """Return flops of the update's products, of the Gram matrices and of the roots."""
    loss_fn, params, batch = make(name)
    layout = optalr.coverage(loss_fn, params, *batch)
    evaluate = with_signals(every, positions)(loss_fn)
    signals = jax.jit(lambda p, b: evaluate(p, *b, True)[2]["signals"])(params, batch)
    apply = gram = roots = 0.0
    for leaf in jax.tree.leaves(signals, is_leaf=lambda m: isinstance(m, optalr.LayerMoments)):
        m, n = leaf.rows.shape[-1], leaf.cols.shape[-1]
        samples = float(leaf.count * leaf.positions)
        # Sampling keeps one example in ``every`` and at most ``positions`` of each.
        per = min(float(leaf.positions), positions)
        used = samples if leaf.positions <= 1 else float(leaf.count) * per
        apply += 2.0 * m * n * (m + n)
        gram += 2.0 * used * (m * m + n * n) / every
        roots += 20.0 * (m**3 + n**3)
    return layout, apply, gram, roots


def measure(name, pairs, *, every, positions):
    layout, *flops = layer_flops(name, every, positions)
    # A switch that is never reached: what is measured is put into its stage by hand.
    tso = optalr.tso_alra(
        1e-2,
        switch_at=10**9,
        update_every=ROOTS_EVERY,
        signals_every=SIGNALS_EVERY,
        layout=layout,
    )
    capture = with_signals(every, positions)
    sgd = Stepper(name, optax.sgd(1e-2), plain_gradient)
    setting = (tso, capture, sgd)
    row = before_the_switch(name, setting, flops, pairs=pairs)
    return row | after_the_switch(name, setting, pairs=pairs)


def before_the_switch(name, setting, flops, *, pairs):
    """Return the columns of the first stage, and those of SGD and of the peer, over Adam's step."""
    tso, capture, sgd = setting
    apply, gram, roots = flops
    adam = Stepper(name, optax.adam(1e-3), plain_gradient)
    row = {"adam_ms": 0.0}
    clocks = {}
    stepper = Stepper(name, tso, capture, flag=jnp.array(False))
    for kind in FREQUENCIES:
        stepper.force, stepper.flag = late(kind), jnp.array(kind != "plain")
        clocks[kind] = alternate(adam, stepper, pairs if kind != "refresh" else max(3, pairs // 2))
        row[kind] = clocks[kind][0]
        row["adam_ms"] = 1e3 * clocks[kind][2]
    row["amortized"] = sum(share * row[kind] for kind, share in FREQUENCIES.items())
    row["amortized_cpu"] = sum(share * clocks[kind][1] for kind, share in FREQUENCIES.items())
    floor = 1 + (apply + gram / SIGNALS_EVERY + roots / ROOTS_EVERY) / adam.flops
    row["floor"] = floor
    row["over_floor"] = row["amortized"] / floor
    del stepper
    row["sgd_over_adam"] = alternate(adam, sgd, pairs)[0]
    peer = somax_stepper(name)
    if peer is not None:
        row["somax"] = alternate(adam, peer, max(3, pairs // 2))[0]
    return row


def after_the_switch(name, setting, *, pairs):
    """Return the columns of the second stage, over SGD's step."""
    tso, capture, sgd = setting
    row = {}

    def switch(state):
        return optalr.set_phase(state, 1.0)

    def release(state):
        return optalr.release_first_stage(switch(state))

    switched = Stepper(name, tso, capture, prepare=switch, flag=jnp.array(False))
    row["traced"], row["traced_cpu"], _ = alternate(sgd, switched, 2 * pairs)
    static = Stepper(name, tso, capture, prepare=release, flag=False)
    row["static"], row["static_cpu"], _ = alternate(sgd, static, 2 * pairs)
    row["static_flops"], row["traced_flops"] = static.flops / sgd.flops, switched.flops / sgd.flops
    return row


def somax_stepper(name):
    """Return a step of python-somax's Gauss-Newton method (CG, its default 20 steps), or None."""
    model, _, _ = problems()[name]
    _, params, (stats, x, y) = make(name)
    if somax is None or stats or y.ndim > 1:  # it takes neither batch statistics nor positions
        return None
    method = somax.sgn_ce(
        predict_fn=lambda p, x: model.apply({"params": p}, x), lam0=1.0, learning_rate=1e-2
    )
    step = jax.jit(method.step)
    carry = [params, method.init(params)]

    def run():
        carry[:] = step(carry[0], {"x": x, "y": y}, carry[1], jax.random.key(0))[:2]
        jax.block_until_ready(carry)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(problems()))
    parser.add_argument("--pairs", type=int, default=9, help="alternating pairs a ratio")
    parser.add_argument("--quick", action="store_true", help="3 pairs, nothing written")
    parser.add_argument("--every", type=int, default=2, help="one example in so many, of a sample")
    parser.add_argument("--positions", type=int, default=16, help="positions of a sample")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "step.json")
    args = parser.parse_args()
    pairs = 3 if args.quick else args.pairs
    about = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "pairs": pairs,
        "every": args.every,
        "positions": args.positions,
        "signals_every": SIGNALS_EVERY,
        "roots_every": ROOTS_EVERY,
    }
    results = {}
    for name in args.models:
        before = os.getloadavg()[0]
        results[name] = measure(name, pairs, every=args.every, positions=args.positions)
        results[name]["load"] = max(before, os.getloadavg()[0])
        print(table({name: results[name]}), flush=True)
        if not args.quick:
            text = json.dumps({"about": about, "results": results}, indent=2)
            args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
