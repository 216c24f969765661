"""Preconditioning by powers of dense matrices: the whole second moment, or its blocks.

Two methods share the room, ``block_diagonal`` and ``full_matrix`` (with its ``window`` of the last
gradients), and with them ``second_moment``: how moments are accumulated and when roots are taken.
"""
