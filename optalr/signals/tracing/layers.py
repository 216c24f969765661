"""Finding the layers of a model in its traced loss.

In: the jaxpr of a loss, whose first inputs are the parameter leaves. Out: ``Layers``, with the plan
(which equations to tap, in which nested jaxpr), and for every leaf that no tap reaches, why.

The jaxpr is walked once, following every parameter leaf through reshapes, casts, inner functions
and loops until a product takes it, and every layer's output up to its bias. A primitive without a
rule ends the way of what it touches: the leaf is reported, never silently dropped.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from optalr.signals.tracing.joined import REARRANGEMENTS, Seen
from optalr.signals.tracing.plan import Layers
from optalr.signals.tracing.rules import inner, moves
from optalr.signals.tracing.rules.multiplying import PRODUCTS, pass_product
from optalr.signals.tracing.views import identity_view
from optalr.signals.tracing.walk import Findings, FollowRule, Walk

# The rule of each primitive that can be followed. Some primitives have had several names in the
# releases of jax that we support.
_RULES: Mapping[str, FollowRule] = MappingProxyType({
    **dict.fromkeys(moves.UNCHANGED, moves.pass_unchanged),
    **dict.fromkeys(REARRANGEMENTS, moves.pass_rearrangement),
    "concatenate": moves.pass_concatenation,
    "slice": moves.pass_slice,
    "split": moves.pass_split,
    **dict.fromkeys(("add", "add_any"), moves.pass_addition),
    **dict.fromkeys(PRODUCTS, pass_product),
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), inner.enter_call),
    **dict.fromkeys(("remat2", "checkpoint", "remat"), inner.enter_remat),
    "scan": inner.enter_scan,
    "cond": inner.enter_branches,
    "shard_map": inner.enter_shard_map,
    "custom_jvp_call": inner.enter_custom_jvp,
})  # fmt: skip


def find_layers(closed: Any, leaf_shapes: Sequence[tuple[int, ...]]) -> Layers:
    """Find the layers of a traced loss.

    Args:
      closed: the ``ClosedJaxpr`` of the loss; its first inputs are the parameter leaves.
      leaf_shapes: the leaves' shapes.

    Returns:
      The plan and what it covers.
    """
    inputs: list[Seen] = [None] * len(closed.jaxpr.invars)
    for leaf, shape in enumerate(leaf_shapes):
        inputs[leaf] = identity_view(leaf, shape)
    walk = Walk(Findings(leaf_shapes), _RULES, mesh_sizes={})
    plan, _ = walk(closed.jaxpr, inputs)
    return walk.findings.settle(plan)
