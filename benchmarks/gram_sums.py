"""What a device receives to measure a GPT's moments, by the compiled program of a step.

    python benchmarks/gram_sums.py                          # 12 blocks of 768, some four minutes
    python benchmarks/gram_sums.py --blocks 1 --width 256

Programs are compiled for 8 simulated devices and not run: a plain step, and one that measures, with
`batch_sharding` and without it. Factors rest in parts. The results of collectives are counted as a
ring receives them: (D - 1)/D of an all-gather's or an all-to-all's, twice that of an all-reduce's,
and D - 1 times a reduce-scatter's.
"""

import argparse
import math
import os
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optalr

DEVICES = 8
KERNELS = ("attention", "projection", "up", "down")
LAYOUTS = {"data parallel": P(), "FSDP": P("data")}
EXAMPLES, POSITIONS = 64, 256
# What a device receives of a collective's result, as often as it is large.
RECEIVED = {
    "all-gather": (DEVICES - 1) / DEVICES,
    "all-to-all": (DEVICES - 1) / DEVICES,
    "all-reduce": 2 * (DEVICES - 1) / DEVICES,
    "reduce-scatter": DEVICES - 1,
    "collective-permute": 1,
}
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(RECEIVED)})(?:-start)?\(")


def kernels(width, num_blocks):
    """Return the shapes of the kernels."""
    sides = (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)
    return {
        f"{name}{block}": jax.ShapeDtypeStruct(shape, jnp.float32)
        for block in range(num_blocks)
        for name, shape in zip(KERNELS, sides, strict=True)
    }


def loss_fn(params, inputs, targets):
    hidden = inputs
    for block in range(len(params) // len(KERNELS)):
        attention, projection, up, down = (params[f"{name}{block}"] for name in KERNELS)
        queries, keys, values = jnp.split(hidden @ attention, 3, -1)
        scores = jnp.einsum("btd,bsd->bts", queries, keys) / math.sqrt(queries.shape[-1])
        hidden = hidden + jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), values) @ projection
        hidden = hidden + jax.nn.gelu(hidden @ up) @ down
    return jnp.mean((hidden - targets) ** 2)


def compiled(params, layout, kind, **capture):
    """Return the compiled program of one kind of step."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    split, options = NamedSharding(mesh, P("data")), {"sharded_factors": True}
    tx = optalr.scale_by_kronecker(mesh=mesh, options=options)

    def placed(tree, shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    places = dict.fromkeys(params, NamedSharding(mesh, LAYOUTS[layout]))
    shardings = optalr.state_shardings(tx, params, mesh, param_shardings=places)
    state = placed(jax.eval_shape(tx.init, params), shardings)
    width = params["projection0"].shape[0]
    batch = jax.ShapeDtypeStruct((EXAMPLES, POSITIONS, width), jnp.float32, sharding=split)
    step = optalr.train_step(loss_fn, tx, storage=optalr.KroneckerOptions(**options), **capture)
    return step.lower(placed(params, places), state, batch, batch, kind=kind).compile()


def received(program):
    """Return the bytes that a device receives in a program's collectives."""
    total = 0.0
    for result, kind in COLLECTIVE.findall(program.as_text()):
        shapes = re.findall(r"f32\[([\d,]*)\]", result)
        numbers = sum(math.prod(map(int, shape.split(","))) for shape in shapes if shape)
        total += 4 * numbers * RECEIVED[kind]
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=12)
    given = parser.parse_args()
    # Read when jax starts its backend, at the first array.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    params = kernels(given.width, given.blocks)
    print("| layout | sums | MB received beside a plain step | MB of temporary arrays |")
    print("|---|---|---|---|")
    for layout in LAYOUTS:
        plain = received(compiled(params, layout, "plain"))
        for name, capture in (("whole", {"batch_sharding": None}), ("in parts", {})):
            program = compiled(params, layout, "measuring", **capture)
            temporary = program.memory_analysis().temp_size_in_bytes
            beside = received(program) - plain
            print(f"| {layout} | {name} | {beside / 1e6:.0f} | {temporary / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
