"""What a walk through a traced loss collects, and how it is settled in the end.

In: sites, biases and other uses of the leaves, in the order in which the walk meets them. Out:
``Layers``, in which every leaf has one matrix view at most and every layer one bias at most.
"""

import dataclasses
from collections.abc import Sequence

from optalr.signals.moments import LeafView
from optalr.signals.tracing.joined import Seen, parts_of
from optalr.signals.tracing.plan import Layers, Plan
from optalr.signals.tracing.sites.hand import HandSite
from optalr.signals.tracing.sites.site import Site


@dataclasses.dataclass
class Findings:
    """What was found up to now.

    Attributes:
      leaf_shapes: shapes of the parameter leaves.
      sites: layers, in the order of execution.
      bias_uses: layers and the leaves added to their outputs.
      notes: for each leaf, how it is used other than by a layer.
    """

    leaf_shapes: Sequence[tuple[int, ...]]
    sites: list[Site] = dataclasses.field(default_factory=list)
    bias_uses: list[tuple[Site, int]] = dataclasses.field(default_factory=list)
    notes: dict[int, list[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.notes = {leaf: [] for leaf in range(len(self.leaf_shapes))}

    def note(self, seen: Seen, text: str) -> None:
        """Write down another use of the parameters in ``seen``; each use once."""
        for part in parts_of(seen):
            if part.is_parameter and text not in self.notes[part.source]:
                self.notes[part.source].append(text)

    def settle(self, plan: Plan) -> Layers:
        """Keep the sites that agree on their leaf's view; pair biases; name the head."""
        accepted, views = self._agreeing_sites()
        biases = self._agreeing_biases(set(accepted))
        plan.keep(set(accepted))
        head = accepted[-1] if accepted else None
        return Layers(plan, accepted, views, biases, self.notes, head)

    def _by_hand(self) -> set[int]:
        return {site.leaf for site in self.sites if isinstance(site, HandSite)}

    def _agreeing_sites(self) -> tuple[list[Site], dict[int, LeafView]]:
        views: dict[int, LeafView] = {}
        accepted: list[Site] = []
        by_hand = self._by_hand()
        for leaf in by_hand:  # what the user declares stands in place of what was found
            self.notes[leaf].clear()
        for site in self.sites:
            if site.leaf in by_hand and not isinstance(site, HandSite):
                continue
            # Moments of one leaf are sums over its uses. The first use decides the view, and one
            # in another orientation has other sides, which cannot be added to these.
            if views.setdefault(site.leaf, site.leaf_view) == site.leaf_view:
                accepted.append(site)
            else:
                self.notes[site.leaf].append("also used by a layer in another orientation")
        return accepted, views

    def _agreeing_biases(self, accepted: set[Site]) -> dict[int, int]:
        by_hand = self._by_hand()
        biases: dict[int, int] = {}
        owners: dict[int, int] = {}
        for site, bias in self.bias_uses:
            # A bias added to a product belongs to the layer that was declared in its place.
            if site not in accepted and site.leaf not in by_hand:
                self.notes[bias].append("added to a layer that is not captured")
            elif owners.setdefault(bias, site.leaf) != site.leaf:
                self.notes[bias].append("added to the outputs of two layers")
                biases.pop(owners[bias], None)
            elif biases.setdefault(site.leaf, bias) != bias:
                self.notes[bias].append("a second bias of its layer")
        return biases
