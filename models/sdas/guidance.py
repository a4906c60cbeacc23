"""Guides the samplers by a classifier of noisy images (Dhariwal & Nichol 2021, arXiv 2105.05233)."""

from collections.abc import Callable

import torch
from torch import nn

from utils.precision import autocast


def guidance_precision(precision: str) -> str:
    """The precision of the guiding classifier beside a diffusion model in this one: gradients would vanish in fp16."""
    return "off" if precision == "fp16" else precision


def classifier_guidance(classifier: nn.Module, scale: float, precision: str = "off") -> Callable:
    """Make the samplers' `cond_fn`, scale * grad_x log p(y | x_t), from a classifier of noisy images.

    Args:
        precision: of the diffusion model, see guidance_precision.
    """
    precision = guidance_precision(precision)

    def cond_fn(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            with autocast(x.device, precision):
                logits = classifier(x, t)
            log_probs = logits.float().log_softmax(dim=-1)
            chosen = log_probs.gather(1, y[:, None]).sum()
            return scale * torch.autograd.grad(chosen, x)[0]

    return cond_fn
