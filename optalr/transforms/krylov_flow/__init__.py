"""A few MINRES steps on a curvature matrix as the direction.

``transform`` is the method, ``damping`` says what is added to the diagonal of the matrix.
"""
