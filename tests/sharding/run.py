"""A short training on a mesh of any number of processes, and its checkpoints."""

import math
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optalr
from tests.sharding import net


def make_params() -> Any:
    """Return parameters whose rows any of the meshes divides."""
    return net.make_params(net.EVEN)


def mesh_of(shape: str) -> Any:
    """Return a mesh, given a text such as "4,2"; None for one device."""
    sizes = tuple(map(int, shape.split(",")))
    if math.prod(sizes) == 1:
        return None
    names = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


class Training:
    """The complete optimizer with roots shared out and factors in parts; FSDP parameters."""

    def __init__(self, mesh: Any):
        self.mesh = mesh
        options = {"min_batches": 2, "sharded_factors": mesh is not None}
        self.tx = optalr.tso_alra(1e-2, update_every=2, damping=1e-2, mesh=mesh, options=options)
        shapes = jax.eval_shape(make_params)
        self.shapes = shapes, jax.eval_shape(self.tx.init, shapes)
        self.shardings = None
        if mesh is not None:
            rows = jax.tree.map(lambda _: NamedSharding(mesh, P("data")), shapes)
            state = optalr.state_shardings(self.tx, shapes, mesh, param_shardings=rows)
            self.shardings = rows, state
        outputs = None if mesh is None else (*self.shardings, None)
        self.step = net.traced(self.tx, out_shardings=outputs)

    def start(self) -> Any:
        """Return parameters and state, made where they lie."""

        def make() -> Any:
            params = make_params()
            return params, self.tx.init(params)

        return jax.jit(make, out_shardings=self.shardings)()

    def advance(self, carry: Any, step: int) -> Any:
        """Return parameters and state a step later; each process makes its part of the batch."""
        batch = [np.asarray(array) for array in net.make_batch(step, net.EVEN)]
        if self.mesh is not None:
            split = NamedSharding(self.mesh, P("data"))
            batch = [
                jax.make_array_from_callback(x.shape, split, lambda index, x=x: x[index])
                for x in batch
            ]
        return self.step(*carry, *batch)[:2]

    def save(self, path: str, carry: Any) -> None:
        """Write a checkpoint, each process its part."""
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, carry)

    def restored(self, path: str) -> Any:
        """Return what a checkpoint holds, wherever that was written."""
        shardings = self.shardings
        if shardings is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: here, self.shapes)
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.shapes, shardings
        )
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, wanted)


def numbers(params: Any) -> dict[str, np.ndarray]:
    """Return parameters whose parts may lie in other processes."""
    return {name: np.asarray(leaf.addressable_data(0)) for name, leaf in whole(params).items()}


def whole(params: Any) -> Any:
    """Return parameters that every device has all of."""
    sharding = next(iter(params.values())).sharding
    if not isinstance(sharding, NamedSharding):
        return params
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(sharding.mesh, P()))(params)
