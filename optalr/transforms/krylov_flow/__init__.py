"""A few MINRES steps on a curvature matrix as the direction.

``transform`` is the method, ``minres_steps`` the solve, ``damping`` says what is added to the
diagonal of the matrix.
"""
