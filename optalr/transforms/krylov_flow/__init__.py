"""A few MINRES steps on a curvature matrix as the direction.

``transform`` holds the method and ``minres_steps`` the solve. ``damping`` decides what is added to
the diagonal of the matrix.
"""

from optalr.transforms.krylov_flow.damping import LevenbergMarquardt
from optalr.transforms.krylov_flow.transform import KrylovFlowState, scale_by_krylov_flow

__all__ = [
    "KrylovFlowState",
    "LevenbergMarquardt",
    "scale_by_krylov_flow",
]
