"""Noise for the samplers, from generators that make an image independent of its batch."""

from collections.abc import Sequence

import torch

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(like: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Standard normal noise of the shape of `like`; with a list of generators, image i comes from generator i alone.

    It is drawn on the generator's device and then moved, so CPU generators give the same noise for every device.
    """
    if generator is None:
        return torch.randn_like(like)
    if isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=generator.device).to(like)
    images = [torch.randn(like.shape[1:], generator=g, device=g.device) for g in generator]
    return torch.stack(images).to(like)
