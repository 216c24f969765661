"""One process of several that train together: ``python -m tests.sharding.process``."""

import argparse
import os
import pathlib

import numpy as np

from tests import xla_flags

LOCAL_DEVICES = 4
CUT, END = 3, 6  # after how many steps a checkpoint is written, and training ends


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mesh", required=True, help="its shape, such as 4,2")
    parser.add_argument("--restore", help="the checkpoint to go on from")
    parser.add_argument("--save", help="where to write a checkpoint")
    parser.add_argument("--result", help="where to write what training ends with")
    parser.add_argument("--dies", type=int, default=-1, help="the process that ends all at once")
    given = parser.parse_args()
    flags = f"--{xla_flags.DEVICES}={LOCAL_DEVICES}"
    os.environ["XLA_FLAGS"] = xla_flags.with_defaults(flags)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{given.port}", given.processes, given.process)
    from tests.sharding import run

    assert jax.device_count() == given.processes * LOCAL_DEVICES
    training = run.Training(run.mesh_of(given.mesh))
    start = CUT if given.restore else 0
    carry = training.restored(given.restore) if given.restore else training.start()
    for step in range(start, END):
        if step == CUT and given.save:
            training.save(given.save, carry)
            if given.dies == given.process:
                os._exit(9)
        carry = training.advance(carry, step)
    numbers = run.numbers(carry[0])  # a collective, so in every process
    if given.result and given.process == 0:
        np.savez(pathlib.Path(given.result), **numbers)


if __name__ == "__main__":
    main()
