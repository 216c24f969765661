"""Linear algebra that is true without an optimizer: arrays or matvecs in, arrays out."""

from optalr.linalg.roots import InverseRoot, inverse_root

__all__ = ["InverseRoot", "inverse_root"]
