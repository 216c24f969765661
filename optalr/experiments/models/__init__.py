"""Models by name."""

from optalr.experiments.models.building import MODELS, Model, build_model

__all__ = ["MODELS", "Model", "build_model"]
