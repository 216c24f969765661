"""Thin adapters: to the training states of frameworks, and to wrappers of transformations.

Importing one of a framework imports the framework; ``wrappers`` and ``packing`` need optax alone.

``optalr.adapters.linen.TrainState`` for Flax linen; ``optalr.adapters.nnx.Optimizer`` and
``optalr.adapters.nnx.value_grad_and_extras`` for Flax nnx.
"""
