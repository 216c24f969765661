"""Whether a layer is all that reads its parameter.

In: a traced loss and one of its layers. Out: yes or no. The leaf is followed from equation to
equation for as long as there is one reader of what came of it. So nothing else can feel it, whether
or not the walk knows what that other reader does.
"""

from typing import Any

from optalr.signals.tracing.jaxprs import CALLS, open_jaxpr
from optalr.signals.tracing.site import Site


def is_sole_reader(closed: Any, site: Site) -> bool:
    """Return whether a leaf is read by this product alone, in a loss whose first inputs are leaves.

    A leaf that leaves the loss, even if only beside it, is read by more than the product.
    """
    jaxpr, around = closed.jaxpr, []
    var = jaxpr.invars[site.leaf]
    while True:
        readers = [
            (equation, place)
            for equation in jaxpr.eqns
            for place, read in enumerate(equation.invars)
            if read is var
        ]
        left = [place for place, out in enumerate(jaxpr.outvars) if out is var]
        if len(readers) + len(left) != 1:
            return False
        if left:
            if not around:
                return False
            jaxpr, call = around.pop()
            var = call.outvars[left[0]]
            continue
        ((equation, place),) = readers
        if equation is site.equation:
            return True
        if equation.primitive.name in CALLS:
            around.append((jaxpr, equation))
            jaxpr = open_jaxpr(equation.params["jaxpr"])
            var = jaxpr.invars[place]
        elif len(equation.outvars) == 1:
            var = equation.outvars[0]
        else:
            return False
