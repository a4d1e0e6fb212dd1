"""Using a trained model: the latent cache, generation, and drafting with multi-token prediction."""

from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.inference.generate import complete, generate, stream
from dsv3_mini.inference.prefix import Prefix

__all__ = ["LatentCache", "Prefix", "complete", "generate", "stream"]
