"""python-somax: a damped Gauss-Newton step, solved by conjugate gradients at each step.

Its default of up to twenty iterations stays, each a product with the Gauss-Newton matrix.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import somax

from ..untuned_parts.methods import schedule
from ..untuned_parts.running import Runner


class GaussNewton(Runner):
    """The method ``sgn_ce``, for a regression ``sgn_mse``, with a cosine."""

    def solver(self, numbers: Any) -> Any:
        regression = self.like.task == "regression"

        def predict(params: Any, x: jax.Array) -> jax.Array:
            outputs, _ = self.objective.outputs(params, {}, x, train=True)
            # It takes one row an example: each position of a text becomes one.
            return outputs if regression else outputs.reshape(-1, outputs.shape[-1])

        make = somax.sgn_mse if regression else somax.sgn_ce
        rate = schedule(numbers["rate"], self.like.steps)
        return make(predict_fn=predict, learning_rate=rate)

    @functools.cached_property
    def start(self) -> Any:
        def start(numbers: Any, params: Any) -> Any:
            if self.objective.init(0)[1]:
                raise NotImplementedError("python-somax takes no batch statistics")
            state = self.solver(numbers).init(params)
            # Its constructor takes a number only, which would be compiled in: a program a setting.
            damping = jnp.asarray(numbers["damping"], state.damp_state.lam.dtype)
            return state.replace(damp_state=state.damp_state.replace(lam=damping))

        return jax.jit(start)

    def step(self, numbers: Any, carry: Any, batch: Any) -> Any:
        params, stats, state = carry
        x, y = batch[0]
        y = y if self.like.task == "regression" else y.reshape(-1)
        # Nothing in this method is random.
        given = {"x": x, "y": y}, state, jax.random.PRNGKey(0)
        params, state, _ = self.solver(numbers).step(params, *given)
        return params, stats, state
