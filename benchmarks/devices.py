"""What `scale_by_kronecker` costs on many devices, counted and not measured.

    python benchmarks/devices.py            # the table, for meshes that no machine here has
    python benchmarks/devices.py --check    # its counts beside programs for 8 simulated devices

Shapes come from `jax.eval_shape`, bytes from `optalr.state_shardings`, shares of the roots from the
plan that the library itself uses. No array is made. A step trains on the same number of tokens on
each device whatever their number. Options are the defaults.

Three forms are told apart. *whole*: parameters and factors on every device. *FSDP*: parameters and
what follows them are sharded by rows, factors and roots are on every device. *parts*: the same with
`sharded_factors=True`, where roots and gradients go to the owners of products in each step.
"""

import argparse
import math
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

import optalr
from optalr.clocks import REFRESH
from optalr.sharding.owners import share_out, share_out_jobs

DEVICES = 8  # simulated, for the check
VOCABULARY = 50_176  # 50 000, up to a multiple of 1024: rows are shared out evenly
MODELS = {"1B": (2048, 24), "7B": (4096, 32)}
MESHES = (8, 64, 1024)
FORMS = ("whole", "FSDP", "parts")
FLOAT = 4  # bytes of a number: parameters, factors and roots are in float32
# Flops of a root are some twenty products, as the polar method's six steps of three and its checks.
ROOT = 40.0


class Speeds(NamedTuple):
    """What a device does in a second, and what a step is."""

    model: float  # flops of the model's products
    single: float  # flops in float32, for directions, moments and roots
    network: float  # bytes received
    tokens: int  # a device and step
    measured: int  # those of them whose moments are taken, where moments are
    update_every: int


class Cost(NamedTuple):
    """What one device does and receives."""

    flops: float
    bytes: float

    def seconds(self, flops_a_second, speeds):
        return self.flops / flops_a_second + self.bytes / speeds.network


def transformer(width, num_layers, vocabulary=VOCABULARY):
    """Return the shapes of the kernels of a GPT, with its embedding and its head."""
    kernels = {
        "attention": (width, 3 * width),
        "projection": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    shapes = {f"{name}{i}": shape for i in range(num_layers) for name, shape in kernels.items()}
    shapes |= {"embedding": (vocabulary, width), "head": (width, vocabulary)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def make(mesh, form, **options):
    options |= {"sharded_factors": form == "parts"}
    return optalr.tso_alra(1e-2, mesh=mesh, options=options)


def state_bytes(params, mesh, form):
    """Return the bytes of the optimizer's state on one device."""
    tx = make(mesh, form)
    rows = jax.P("data")
    specs = {name: jax.P() if form == "whole" else rows for name in params}
    shardings = optalr.state_shardings(tx, params, mesh, param_shardings=specs)
    pairs = zip(
        jax.tree.leaves(shardings), jax.tree.leaves(jax.eval_shape(tx.init, params)), strict=True
    )
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for s, x in pairs)


def factor_sizes(params, **options):
    """Return how many matrices of each size there are to decompose."""
    state = jax.eval_shape(optalr.scale_by_kronecker(options=options).init, params)
    numbers = {}
    for leaf in jax.tree.leaves([side.factor for side in state.memory.sides]):
        if leaf.ndim > 1:
            n = leaf.shape[-1]
            numbers[n] = numbers.get(n, 0) + math.prod(leaf.shape[:-2])
    return dict(sorted(numbers.items(), reverse=True))


def refresh(numbers, num_devices, form):
    """Return what the busiest device does in a refresh, and what each receives."""
    sizes = list(numbers)
    shares = share_out(sizes, list(numbers.values()), num_devices)
    cubes = sum(s.counts * float(n) ** 3 for n, s in zip(sizes, shares, strict=True))
    # What a device hands on: a root, its residual and whether it is good.
    squares = sum(s.counts * float(n) ** 2 for n, s in zip(sizes, shares, strict=True))
    flags = sum(2 * s.counts for s in shares)
    if form == "parts":  # factors come by rows, roots go by rows
        moved, handed = 2 * squares.max() / num_devices, flags
    else:
        moved, handed = 0.0, squares + flags
    busy, others = int(np.count_nonzero(flags)), num_devices - 1
    if busy + 1 < num_devices:  # vectors are dealt out first, and empty ones not gathered
        received = others / num_devices * (busy + 1) * handed.max()
    else:
        received = others * handed.max()
    return Cost(ROOT * cubes.max(), FLOAT * (others * moved + received))


class Product(NamedTuple):
    """What all kernels of one shape have in common."""

    number: int
    flops: float  # of one kernel's two products
    rows: float  # numbers that come by rows: the gradient, and roots that rest so
    gradient: float  # numbers of the gradient, and of the update


def products(params, num_devices, **options):
    """Return what there is to multiply in each step, a kind for each shape."""
    options, kinds = optalr.KroneckerOptions(**options), {}
    for shape in (leaf.shape for leaf in params.values()):
        kinds[shape] = kinds.get(shape, 0) + 1
    found = []
    for (m, n), number in kinds.items():
        sides = [options.side(size) for size in (m, n)]
        # A diagonal, and what cannot be cut, comes from nowhere: each device has it.
        moved = [
            side.count
            for side in sides
            if side.block and any(axis % num_devices == 0 for axis in side.shape[:-1])
        ]
        size = math.prod(side.padded_size for side in sides)
        flops = 2.0 * size * sum(side.block for side in sides)
        found.append(Product(number, flops, size + sum(moved), size))
    return found


def direction(params, num_devices, form):
    """Return what the busiest device does in each update to turn gradients, and what each receives.

    In parts it gets rows of gradients and roots of its own kernels, and rows of all updates. Every
    device's letters are as long as those of the device with the most.
    """
    kinds = products(params, num_devices)
    if form != "parts":
        return Cost(sum(kind.number * kind.flops for kind in kinds), 0.0)
    costs, numbers = [kind.flops for kind in kinds], [kind.number for kind in kinds]
    shares = share_out_jobs(costs, numbers, num_devices)

    def busiest(amounts):
        each = sum(s.counts * float(x) for s, x in zip(shares, amounts, strict=True))
        return each.max()

    arriving = busiest([kind.rows for kind in kinds])
    returning = busiest([kind.gradient for kind in kinds])
    received = FLOAT * (arriving + returning) * (num_devices - 1) / num_devices
    return Cost(busiest(costs), received)


def measurement(numbers, num_devices, form, tokens):
    """Return what a device does to measure moments: its tokens' products, and their sum.

    In parts it receives its rows of the sums (`batch_sharding`), otherwise an all-reduce of them.
    """
    squares, trips = sum(number * float(n) ** 2 for n, number in numbers.items()), 2
    if form == "parts":
        trips = 1
    return Cost(2.0 * tokens * squares, trips * FLOAT * squares * (num_devices - 1) / num_devices)


def model(params, num_devices, form, tokens):
    """Return what a device does for the gradient, and receives: a sum, or two gathers and a sum."""
    size = sum(math.prod(leaf.shape) for leaf in params.values())
    trips = 2 if form == "whole" else 3
    return Cost(6.0 * size * tokens, trips * FLOAT * size * (num_devices - 1) / num_devices)


def row(name, params, num_devices, form, speeds):
    """Return a line of the table."""
    mesh, numbers = AbstractMesh((num_devices,), ("data",)), factor_sizes(params)
    roots, turned = refresh(numbers, num_devices, form), direction(params, num_devices, form)
    moments = measurement(numbers, num_devices, form, speeds.measured)
    step = model(params, num_devices, form, speeds.tokens)
    ours = (
        turned.seconds(speeds.single, speeds)
        + roots.seconds(speeds.single, speeds) / speeds.update_every
        + moments.seconds(speeds.single, speeds) / (speeds.update_every / 10)
    )
    alone = refresh(numbers, 1, form).flops
    return (
        f"| {name} | {num_devices} | {form} | {state_bytes(params, mesh, form) / 1e9:.2f} "
        f"| {roots.flops / 1e12:.2f} | {alone / roots.flops:.1f} | {roots.bytes / 1e9:.2f} "
        f"| {turned.flops / 1e12:.3f} | {turned.bytes / 1e9:.2f} "
        f"| {step.flops / 1e12:.0f} | {step.bytes / 1e9:.2f} "
        f"| {100 * ours / step.seconds(speeds.model, speeds):.0f} % |"
    )


HEADER = """\
| model | devices | form | GB of state | refresh TFLOP | one device's over it | refresh GB \
| direction TFLOP | direction GB | gradient TFLOP | gradient GB | time over the gradient's |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def print_table(speeds):
    print(HEADER)
    for name, (width, num_layers) in MODELS.items():
        params = transformer(width, num_layers)
        for num_devices in MESHES:
            for form in FORMS:
                print(row(name, params, num_devices, form, speeds), flush=True)
    print("\nWhere one device's work does not shrink any more, it has a single root:")
    for name, (width, num_layers) in MODELS.items():
        params = transformer(width, num_layers)
        for block in (None, width // 2, width // 4):
            numbers = factor_sizes(params, block_size=block)
            largest, total = max(numbers), sum(k * float(n) ** 3 for n, k in numbers.items())
            busiest = refresh(numbers, 1024, "whole").flops
            print(
                f"{name}, block_size={block}: {sum(numbers.values())} matrices of at most "
                f"{largest} rows; no gain beyond {total / largest**3:.0f} devices; of 1024 the "
                f"busiest has {busiest / 1e12:.2f} TFLOP"
            )


# The check: the same counts for a small model, beside compiled programs.


def compiled(tx, params, told):
    """Return the compiled program of an update that is told what to do."""

    def update(grads, state):
        return tx.update(grads, state._replace(told=np.int8(told)), grads)

    return jax.jit(update).lower(params, jax.eval_shape(tx.init, params)).compile()


def compiled_flops(tx, params):
    """Return the flops that XLA counts of a refresh: a loop as one round, the dearest branches."""
    refreshing, plain = (compiled(tx, params, told).cost_analysis() for told in (REFRESH, 0))
    return refreshing["flops"] - plain["flops"]


def received_bytes(text, kind):
    """Return the bytes that a device receives in the collectives of a kind."""
    results = [line.split(f" {kind}(")[0] for line in text.splitlines() if f" {kind}(" in line]
    shapes = [shape for result in results for shape in re.findall(r"f32\[([\d,]+)\]", result)]
    total = FLOAT * sum(math.prod(map(int, shape.split(","))) for shape in shapes)
    return total * (DEVICES - 1) // DEVICES


def check():
    """Return what this script counts for a small model, and what compiled programs say of it."""
    params = transformer(64, 3, vocabulary=5_000)
    mesh, numbers = jax.make_mesh((DEVICES,), ("data",)), factor_sizes(params)
    found, counted = {}, {}
    shares = share_out(list(numbers), list(numbers.values()), DEVICES)
    for form, kind in (("FSDP", "all-gather"), ("parts", "all-to-all")):
        options = {"sharded_factors": form == "parts"}
        tx = optalr.scale_by_kronecker(mesh=mesh, statistics="gradient", options=options)
        both, plain = (
            received_bytes(compiled(tx, params, told).as_text(), kind) for told in (REFRESH, 0)
        )
        found[f"{form}: bytes of a refresh"] = both - plain
        found[f"{form}: bytes of a direction"] = plain
        counted[f"{form}: bytes of a direction"] = direction(params, DEVICES, form).bytes
        flags = FLOAT * (DEVICES - 1) * max(sum(2 * share.counts for share in shares))
        received = refresh(numbers, DEVICES, form).bytes
        # In parts the flags go in a gather of their own. Here every device has some.
        counted[f"{form}: bytes of a refresh"] = received - (flags if form == "parts" else 0)
        tx = make(mesh, form)
        rows = {name: jax.P("data") for name in params}
        shardings = optalr.state_shardings(tx, params, mesh, param_shardings=rows)
        made = jax.jit(tx.init, out_shardings=shardings).lower(params).compile()
        table = 8 * len(jax.tree.leaves(shardings))  # of pointers, one for each output
        found[f"{form}: state"] = made.memory_analysis().output_size_in_bytes - table
        counted[f"{form}: state"] = state_bytes(params, mesh, form)
    # Products alone, which XLA counts.
    products = {"root_method": "coupled_newton"}
    alone, shared = (
        compiled_flops(
            optalr.scale_by_kronecker(-1.0, mesh=each, statistics="gradient", options=products),
            params,
        )
        for each in (None, mesh)
    )
    cubes = [n**3 for n in numbers]
    total = np.dot(cubes, list(numbers.values()))
    found["share of the flops"] = shared / alone
    counted["share of the flops"] = np.dot(cubes, [max(s.counts) for s in shares]) / total
    return counted, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model-flops", type=float, default=400e12)
    parser.add_argument("--single-flops", type=float, default=50e12)
    parser.add_argument("--network", type=float, default=50e9, help="bytes a second and device")
    parser.add_argument("--tokens", type=int, default=8192, help="of a device in a step")
    parser.add_argument("--measured", type=int, default=2048, help="tokens of a measurement")
    parser.add_argument("--update-every", type=int, default=50)
    given = parser.parse_args()
    if given.check:
        # Read when jax starts its backend, at the first array.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        counted, found = check()
        for name, number in counted.items():
            print(f"{name}: counted {number}, compiled {found[name]}")
        return
    speeds = Speeds(
        model=given.model_flops,
        single=given.single_flops,
        network=given.network,
        tokens=given.tokens,
        measured=given.measured,
        update_every=given.update_every,
    )
    print_table(speeds)


if __name__ == "__main__":
    main()
