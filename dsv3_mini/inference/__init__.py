"""Using a trained model: the latent cache, and generation."""

from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.inference.generate import generate

__all__ = ["LatentCache", "generate"]
