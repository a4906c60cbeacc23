"""Draws images of a class with trained networks of SDAS, each from its own random numbers."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict

from models.sdas.diffusion import AfterStep, SpacedDiffusion, start_of
from models.sdas.guidance import classifier_guidance, guidance_precision
from models.sdas.pictures import to_pictures
from models.sdas.trained import class_list, load_averaged, load_networks
from models.sdas.unet import check_size, create_classifier_unet, create_diffusion_unet
from utils.config import collect_errors, model_kwargs
from utils.device import to_device
from utils.distributed import Run
from utils.errors import RunError
from utils.precision import autocast, cast_weights, resolve_precision

log = logging.getLogger("realnet")


@dataclass(frozen=True)
class Beginning:
    """Good images that drawing begins with, in place of pure noise (Meng et al. 2022, SDEdit, arXiv 2108.01073).

    Noised to a depth and drawn back with strength s, they keep their colours and layout, which a model learns last, or
    never if it is trained on crops.

    Args:
        good: a good image (3,H,W) in [-1, 1] of a class, by the class's name and a number in [0, 1).
        depth: range (low, high) of the share of all timesteps that an image is noised to.
    """

    good: Callable[[str, float], torch.Tensor]
    depth: tuple[float, float]


@dataclass
class Sampler:
    """Draws images of a class, each from its own random numbers."""

    process: SpacedDiffusion
    unet: torch.nn.Module
    cond_fn: Callable | None
    method: str  # see SpacedDiffusion.sample_loop
    precision: str
    size: tuple[int, int]
    seed: int
    device: torch.device
    beginning: Beginning | None = None  # None: pure noise
    grey: bool = False  # three equal channels, the mean of what is drawn

    def model(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            return self.unet(x, t, y)

    def draw(
        self,
        name: str,
        number: int,
        indices: Sequence[int],
        low: float | torch.Tensor,
        high: float | torch.Tensor,
        progress: bool = False,
        after_step: AfterStep | None = None,
    ) -> np.ndarray:
        """Draw the images (N,H,W,3) uint8 with these indices, each with its own strength from [low, high].

        Args:
            after_step: see SpacedDiffusion.p_sample_loop.
        """
        generators = self._generators(name, indices)
        strengths = _strengths(generators, low, high)
        goods, start = self._begin(name, generators)
        images = self.sample(number, strengths, generators, progress, after_step, goods, start)
        if not images.isfinite().all():
            raise RunError(f"{name}: the model draws values that are not finite; it has diverged, or needs amp: off")
        if self.grey:
            images = images.clamp(-1, 1).mean(dim=1, keepdim=True).expand_as(images)
        return to_pictures(images)

    def strengths(self, name: str, indices: Sequence[int], low: float, high: float) -> list[float]:
        """The strengths that `draw` gives to images."""
        return _strengths(self._generators(name, indices), low, high).tolist()

    def sample(
        self,
        number: int,
        strengths: torch.Tensor,
        generators: Sequence[torch.Generator],
        progress: bool = False,
        after_step: AfterStep | None = None,
        goods: torch.Tensor | None = None,
        start: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Images (N,3,H,W) of a class, on the device, about -1 .. 1, with strengths (N,). No step waits for it.

        Args:
            goods, start: good images (N,3,H,W), and the timestep of the process that each is noised to; None begins
                with pure noise.
        """
        x = to_device(torch.stack([torch.randn(3, *self.size, generator=g) for g in generators]), self.device)
        if goods is not None and start is not None:
            x = self.process.q_sample(to_device(goods, self.device), to_device(torch.tensor(start), self.device), x)
        y = torch.full((len(generators),), number, device=self.device)
        return self.process.sample_loop(self.method)(
            self.model,
            x,
            s=to_device(strengths, self.device),
            cond_fn=self.cond_fn,
            model_kwargs={"y": y},
            generator=generators,
            progress=progress,
            start=start,
            after_step=after_step,
        )

    def _generators(self, name: str, indices: Sequence[int]) -> list[torch.Generator]:
        """One for each image, so that its random numbers do not depend on the batch."""
        return [torch.Generator().manual_seed(image_seed(self.seed, name, i)) for i in indices]

    def _begin(
        self, name: str, generators: Sequence[torch.Generator]
    ) -> tuple[torch.Tensor, list[int]] | tuple[None, None]:
        """A good image for each generator, and the timestep that it is noised to; None if pure noise is begun with."""
        if self.beginning is None:
            return None, None
        drawn = torch.stack([torch.rand(2, generator=g) for g in generators])
        low, high = self.beginning.depth
        depths = low + (high - low) * drawn[:, 1]
        goods = torch.stack([self.beginning.good(name, float(share)) for share in drawn[:, 0]])
        return goods, [start_of(self.process, float(depth)) for depth in depths]


def _strengths(
    generators: Sequence[torch.Generator], low: float | torch.Tensor, high: float | torch.Tensor
) -> torch.Tensor:
    """The strengths (N,) in [low, high]: the first number of each generator."""
    return low + (high - low) * torch.stack([torch.rand((), generator=g) for g in generators])


def open_networks(config: EasyDict, path: Path, known: Sequence[str]) -> tuple[dict[str, tuple[Path, dict]], list[str]]:
    """The checkpoints that a sample.yaml at `path` names (see load_networks), checked, and their classes.

    Args:
        known: see class_list.
    """
    networks = load_networks(config)
    check_networks(config, path)
    return networks, class_list(config, networks, known)


def check_networks(config: EasyDict, path: Path) -> None:
    """Check the networks' settings, which the checkpoints may have brought, before anything is drawn."""
    size = (config.dataset.H, config.dataset.W)

    def networks() -> None:
        with torch.device("meta"):
            create_diffusion_unet(**model_kwargs(config.unet))
            if config.classifier is not None:
                create_classifier_unet(**model_kwargs(config.classifier), image_size=size)

    collect_errors(
        path,
        [
            ("dataset", lambda: check_size(size, config.unet.channel_mult, "dataset.H, dataset.W")),
            ("unet, classifier", networks),
            ("TestSampler", lambda: SpacedDiffusion(**config.TestSampler)),
        ],
    )


def set_up_sampler(config: EasyDict, run: Run, networks: dict[str, tuple[Path, dict]]) -> Sampler:
    """Load the weights and set up the diffusion process."""
    size = (config.dataset.H, config.dataset.W)
    unet = create_diffusion_unet(**model_kwargs(config.unet))
    load_averaged(unet, *networks["unet"], "the unet section of sample.yaml")
    precision, cond_fn = resolve_precision(config.amp, run.device), None
    # Convolutions in bf16 and fp16 are made for channels-last weights; float32 is not faster with them on a CPU.
    layout = torch.contiguous_format if precision == "off" else torch.channels_last
    unet.requires_grad_(False).eval().to(run.device, memory_format=layout)
    cast_weights(unet, precision)
    if "classifier" in networks:
        classifier = create_classifier_unet(**model_kwargs(config.classifier), image_size=size)
        load_averaged(classifier, *networks["classifier"], "the classifier section of sample.yaml")
        log.info("guidance scale %g", config.classifier_scale)
        classifier.requires_grad_(False).eval().to(run.device, memory_format=layout)
        cast_weights(classifier, guidance_precision(precision))
        cond_fn = classifier_guidance(classifier, config.classifier_scale, precision)
    process = SpacedDiffusion(**config.TestSampler)
    grey = config.color_mode == "GRAY"
    return Sampler(process, unet, cond_fn, config.sampler, precision, size, config.random_seed, run.device, grey=grey)


def image_seed(seed: int, name: str, index: int) -> int:
    """The seed of one image's random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()[:8], "big") >> 1
