"""A few MINRES steps on a curvature matrix as the direction."""

from optalr.transforms.krylov_flow.damping import LevenbergMarquardt
from optalr.transforms.krylov_flow.transform import scale_by_krylov_flow

__all__ = ["LevenbergMarquardt", "scale_by_krylov_flow"]
