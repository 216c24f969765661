"""Thin adapters to the training states of frameworks; importing one imports its framework.

``optalr.adapters.linen.TrainState`` for Flax linen; ``optalr.adapters.nnx.Optimizer`` and
``optalr.adapters.nnx.value_grad_and_extras`` for Flax nnx.
"""
