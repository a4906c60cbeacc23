"""Noise for the samplers, from generators that make an image independent of its batch."""

from collections.abc import Sequence

import torch

from utils.device import to_device

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(like: torch.Tensor, generator: Generators, needed: Sequence[bool] | None = None) -> torch.Tensor:
    """Standard normal noise of the shape of `like`; with a list of generators, image i comes from generator i alone.

    It is drawn on the generator's device and then moved, so CPU generators give the same noise for every device.

    Args:
        needed: which images need noise; the others get zeros, and their generators of a list stay where they are.
    """
    if generator is None:
        return torch.randn_like(like)
    if isinstance(generator, torch.Generator):
        noise = torch.randn(like.shape, generator=generator, device=generator.device)
        return to_device(noise, like.device).to(like.dtype)
    images = [
        torch.randn(like.shape[1:], generator=g, device=g.device)
        if needed is None or needed[i]
        else torch.zeros(like.shape[1:], device=g.device)
        for i, g in enumerate(generator)
    ]
    return to_device(torch.stack(images), like.device).to(like.dtype)
