"""SDAS: strength-controllable diffusion anomaly synthesis (RealNet, section 3.1)."""

from models.sdas.diffusion import SpacedDiffusion
from models.sdas.unet import check_size, check_training_size, create_classifier_unet, create_diffusion_unet

__all__ = ["SpacedDiffusion", "check_size", "check_training_size", "create_classifier_unet", "create_diffusion_unet"]
