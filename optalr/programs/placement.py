"""Where the arrays of a step lie, as far as a program is made for it.

In: arrays, or their shapes with shardings. Out: what the program may rely on, a ``Placement`` that
compares equal for calls of one program.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec


class Placement(NamedTuple):
    """What a program is made for.

    Attributes:
      alone: whether all is on one device.
      batch: how the examples are sharded, where that is for the program to know; else None.
    """

    alone: bool
    batch: NamedSharding | None


class Carried(NamedTuple):
    """Where lies what a step hands on to the next.

    Attributes:
      alone: whether the parameters are on one device.
      in_parts: whether some factor has another part on each of several devices.
    """

    alone: bool
    in_parts: bool

    @classmethod
    def of(cls, params: Any, factors: Any) -> "Carried":
        """Return where parameters and factors lie."""
        in_parts = any(not sharding.is_fully_replicated for sharding in _shardings(factors))
        return cls(_on_one_device(params), in_parts)

    def with_data(self, arrays: Sequence[Any], args: Any) -> Placement:
        """Return what a program is made for that is given these arrays, those of ``args`` too."""
        alone = self.alone and _on_one_device(arrays)
        return Placement(alone, _sharding_of_examples(args) if self.in_parts else None)


def _on_one_device(arrays: Any) -> bool:
    """Return whether no array is known to be on several devices."""
    return all(sharding.num_devices == 1 for sharding in _shardings(arrays))


def _sharding_of_examples(arrays: Any) -> NamedSharding | None:
    """Return how the first axis of all sharded arrays is sharded; None where they do not agree.

    Several arrays of a batch have one entry in common. Where there is another entry, one of them is
    no batch, and nobody says which.
    """
    sharded = (
        sharding
        for sharding in _shardings(arrays)
        if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated
    )
    found = {(sharding.mesh, sharding.spec[0]) for sharding in sharded}
    if len(found) != 1:
        return None
    ((mesh, first),) = found
    context = jax.sharding.get_abstract_mesh()
    known = context.empty or dict(context.shape) == dict(mesh.shape)
    return NamedSharding(mesh, PartitionSpec(first)) if known and first is not None else None


def _shardings(arrays: Any) -> Iterator[Any]:
    """Yield how arrays are sharded, as far as that is known."""
    for array in jax.tree.leaves(arrays):
        sharding = getattr(array, "sharding", None)
        if sharding is not None:
            yield sharding
