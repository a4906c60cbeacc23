"""What a diffusion model makes of given images: inverted to noise and sampled back (Song et al. 2021, section 4.3)."""

from collections.abc import Callable

import torch

from models.sdas.diffusion import SpacedDiffusion


def reconstruct(process: SpacedDiffusion, model: Callable, images: torch.Tensor, number: int) -> torch.Tensor:
    """Images (N,3,H,W) in [-1, 1] of a class with this number, inverted to noise and sampled back by DDIM."""
    y = torch.full((len(images),), number, device=images.device)
    noise = process.ddim_reverse_sample_loop(model, images, {"y": y})
    return process.ddim_sample_loop(model, noise, model_kwargs={"y": y})
