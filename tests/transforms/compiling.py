"""Compiling for tests: programs that run once or twice."""

import functools

import jax

# The programs are small and many: compiling them is all the time that these tests take.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
