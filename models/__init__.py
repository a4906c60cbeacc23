"""RealNet and SDAS networks."""

from importlib import import_module
from typing import Any

__all__ = ["build_realnet", "check_realnet"]


def __getattr__(name: str) -> Any:
    """Load the networks when one is asked for: models.structures, for one, needs no PyTorch, which takes seconds."""
    if name in __all__:
        return getattr(import_module("models.realnet"), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
