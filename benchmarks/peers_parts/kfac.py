"""kfac-jax: its own optimizer, and its preconditioner in an optax chain with F^(-1/2).

Both are told of their likelihood inside the loss, as their documentation asks. Learning rate and
damping are given at each step, so one program serves a whole grid. No batch statistics are handed
on, so nets with batch normalization are refused.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import optax

from ..untuned_parts.methods import schedule
from ..untuned_parts.running import Runner
from .methods import MOMENTUM


class KfacRunner(Runner):
    """What both forms share: the loss with its registration, and an example of a batch."""

    @property
    def example(self) -> tuple[jax.Array, jax.Array]:
        size = self.like.problem.batch
        return self.like.train.x[:size], self.like.train.y[:size]

    def refuse_statistics(self, stats: Any) -> None:
        if stats:
            raise NotImplementedError("nets with batch normalization are not run with kfac-jax")

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Return the mean loss of a batch, registered with kfac-jax."""
        x, y = batch
        outputs, _ = self.objective.outputs(params, {}, x, train=True)
        # kfac-jax takes the sum of losses over the number of examples; ours is their mean, over the
        # positions of a text as well.
        weight = len(x) / y.size
        if self.like.task == "regression":
            kfac_jax.register_squared_error_loss(outputs, y, weight=weight)
        else:
            kfac_jax.register_softmax_cross_entropy_loss(outputs, y, weight=weight)
        return self.objective.loss(outputs, y)


class Own(KfacRunner):
    """kfac-jax's own optimizer, called from Python at each step, as its documentation demands."""

    @functools.cached_property
    def kfac(self) -> Any:
        return kfac_jax.Optimizer(
            value_and_grad_func=jax.value_and_grad(self.loss),
            l2_reg=0.0,
            # There is no iterator of batches to burn in with.
            num_burnin_steps=0,
        )

    @functools.cached_property
    def start(self) -> Any:
        def start(numbers: Any, params: Any) -> Any:
            del numbers
            self.refuse_statistics(self.objective.init(0)[1])
            return self.kfac.init(params, jax.random.PRNGKey(0), self.example)

        return start

    @functools.cached_property
    def compiled(self) -> Any:
        rates = jax.jit(lambda rate, at: schedule(rate, self.like.steps)(at))
        fetch = jax.jit(lambda part, index: (part[0][index], part[1][index]))

        def steps(numbers: Any, carry: Any, data: Any, entries: Any, value: Any) -> Any:
            del value
            params, stats, state = carry
            at = int(state.step_counter)
            for index in entries[0]:
                params, state, _ = self.kfac.step(
                    params,
                    state,
                    jax.random.PRNGKey(at),
                    batch=fetch(data[0], index),
                    learning_rate=rates(numbers["rate"], at),
                    momentum=jnp.float32(MOMENTUM),
                    damping=numbers["damping"],
                    global_step_int=at,
                )
                at += 1
            return params, stats, state

        return steps


class Root(KfacRunner):
    """kfac-jax's preconditioner in front of momentum, with the inverse square root.

    Only its eigendecompositions have this power: the factored root that is the default lacks an
    import in 0.0.8.
    """

    def preconditioner(self, numbers: Any) -> Any:
        return kfac_jax.OptaxPreconditioner(
            self.loss,
            damping=numbers["damping"],
            use_sqrt_inv=True,
            use_exact_inverses=True,
            pmap_axis_name=None,
        )

    @functools.cached_property
    def start(self) -> Any:
        def start(numbers: Any, params: Any) -> Any:
            self.refuse_statistics(self.objective.init(0)[1])
            found = self.preconditioner(numbers).init((params, self.example), jax.random.PRNGKey(0))
            return found, self.optimizer(numbers).init(params)

        return jax.jit(start)

    def step(self, numbers: Any, carry: Any, batch: Any) -> Any:
        params, stats, (found, state) = carry
        preconditioner = self.preconditioner(numbers)
        arguments = params, batch[0]
        found = preconditioner.maybe_update(
            found, arguments, jax.random.fold_in(jax.random.PRNGKey(0), found.count)
        )
        grads = jax.grad(self.loss)(*arguments)
        updates, state = self.optimizer(numbers).update(
            preconditioner.apply(grads, found), state, params
        )
        found = preconditioner.increment_count(found)
        return optax.apply_updates(params, updates), stats, (found, state)
