"""Thin adapters to frameworks' own training states; importing one imports its framework.

``optalr.adapters.linen.TrainState`` for Flax linen; ``optalr.adapters.nnx.Optimizer`` and
``optalr.adapters.nnx.value_grad_and_extras`` for Flax nnx.
"""
