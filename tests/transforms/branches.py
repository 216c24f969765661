"""What a step does outside the loops of no turn or one that stand for branches."""

import jax
import jax.numpy as jnp


def assert_roots_stay_in_branches(update, args, lanes):
    """Check that an update decomposes in a branch only, also when ``lanes`` states are vmapped."""
    if lanes is not None:
        args = jax.tree.map(lambda x: jnp.stack([x] * lanes), args)
        update = jax.vmap(update)
    jaxpr = jax.make_jaxpr(update)(*args)
    outside = str([eqn for eqn in jaxpr.eqns if eqn.primitive.name != "while"])
    branches = str([eqn for eqn in jaxpr.eqns if eqn.primitive.name == "while"])
    assert "eigh" in branches or "cholesky" in branches
    assert "eigh" not in outside
    assert "cholesky" not in outside
