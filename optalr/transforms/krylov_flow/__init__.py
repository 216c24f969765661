"""A few MINRES steps on a curvature matrix as the direction.

``transform`` holds the method and ``minres_steps`` the solve. ``damping`` decides what is added to
the diagonal of the matrix.
"""
