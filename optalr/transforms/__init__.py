"""The methods: composable optax transformations, each in a module or a folder of its own.

``shared`` is no method. It holds what several methods use.
"""
