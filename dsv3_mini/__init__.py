"""DeepSeek-V3, readable: the package that the course builds. See README.md and lessons/."""

from dsv3_mini.config import ModelConfig
from dsv3_mini.hub import from_pretrained, save_pretrained
from dsv3_mini.inference import generate
from dsv3_mini.model import DeepSeekV3

__all__ = ["DeepSeekV3", "ModelConfig", "from_pretrained", "generate", "save_pretrained"]
