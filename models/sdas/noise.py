"""Noise for the samplers, from generators that make an image independent of its batch."""

from collections.abc import Sequence

import torch

from utils.device import to_device

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(like: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Standard normal noise of the shape of `like`; with a list of generators, image i comes from generator i alone.

    It is drawn on the generator's device and then moved, so CPU generators give the same noise for every device.
    """
    if generator is None:
        return torch.randn_like(like)
    if isinstance(generator, torch.Generator):
        noise = torch.randn(like.shape, generator=generator, device=generator.device)
        return to_device(noise, like.device).to(like.dtype)
    images = [torch.randn(like.shape[1:], generator=g, device=g.device) for g in generator]
    return to_device(torch.stack(images), like.device).to(like.dtype)
