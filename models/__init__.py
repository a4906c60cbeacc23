"""RealNet and SDAS networks."""

from models.realnet import build_realnet, check_realnet

__all__ = ["build_realnet", "check_realnet"]
