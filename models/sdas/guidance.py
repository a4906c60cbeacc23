"""Guides the samplers by a classifier of noisy images (Dhariwal & Nichol 2021, arXiv 2105.05233)."""

from collections.abc import Callable

import torch
from torch import nn

from utils.precision import autocast


def classifier_guidance(classifier: nn.Module, scale: float, precision: str = "off") -> Callable:
    """Make the samplers' `cond_fn`, scale * grad_x log p(y | x_t), from a classifier of noisy images.

    Args:
        precision: of the classifier: "off", "bf16", or "fp16", which is "off" here, because its gradients would vanish.
    """

    precision = "off" if precision == "fp16" else precision

    def cond_fn(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            with autocast(x.device, precision):
                logits = classifier(x, t)
            log_probs = logits.float().log_softmax(dim=-1)
            chosen = log_probs.gather(1, y[:, None]).sum()
            return scale * torch.autograd.grad(chosen, x)[0]

    return cond_fn
