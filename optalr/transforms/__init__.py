"""Each method as a composable optax transformation: a module, or a folder where it needs several.

``shared`` holds what several methods use and is no method itself.
"""
