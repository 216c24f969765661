"""A function and its arguments as a ``Partial`` that a compiled program takes as an argument."""
