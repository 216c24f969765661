"""The precision of what a published recurrence keeps as a scalar."""

from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import wide_dtype


def real_dtype(params: Any) -> Any:
    """Return the dtype of a real sum over all parameters, float32 or wider.

    A rate in float32 would differ from the paper's at the eighth digit, where parameters are
    float64 and a rule compares to 1e-9.
    """
    return wide_dtype(jnp.float32, *(jnp.finfo(x.dtype).dtype for x in jax.tree.leaves(params)))
