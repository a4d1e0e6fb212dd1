"""DeepSeek-V3, readable: the package that the course builds. See README.md and lessons/."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_mini.config import ModelConfig
    from dsv3_mini.hub import from_pretrained, save_pretrained
    from dsv3_mini.inference import generate
    from dsv3_mini.model import DeepSeekV3

__all__ = ["DeepSeekV3", "ModelConfig", "from_pretrained", "generate", "save_pretrained"]

_HOMES = {
    "DeepSeekV3": "model",
    "ModelConfig": "config",
    "from_pretrained": "hub",
    "generate": "inference",
    "save_pretrained": "hub",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: `dsv3 --help` and `dsv3 doctor` must not wait for torch, nor need it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
