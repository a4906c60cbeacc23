"""One step of each script on made-up images, which benchmarks/memory.py and benchmarks/gpu.py measure."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_classifier
import train_diffusion
import train_realnet
from models import build_realnet
from models.losses import DETECTOR_LOSSES, build_criterion
from models.sdas import SpacedDiffusion, create_classifier_unet, create_diffusion_unet
from models.sdas.guidance import classifier_guidance
from models.sdas.sampler import Sampler
from utils.config import load_config, model_kwargs
from utils.distributed import Run
from utils.optim import EpochLoss
from utils.precision import autocast
from utils.training import Training, set_up_training

TRAININGS = ("detector", "diffusion", "classifier")
FILES = {"detector": "realnet", "diffusion": "diffusion", "classifier": "classifier"}
NEVER = 10**9
SAVER = SimpleNamespace(after_step=lambda: None)
BATCH = "dataset.batch_size={}"
# No step is reported, and none is skipped for the sake of accumulation.
QUIET = {
    "detector": [f"trainer.print_freq_step={NEVER}", f"trainer.max_epoch={NEVER}"],
    "diffusion": [f"trainer.print_freq_step={NEVER}", f"trainer.max_epoch={NEVER}", "trainer.accumulate=1"],
    "classifier": [f"trainer.print_freq_step={NEVER}", f"trainer.max_epoch={NEVER}", "trainer.accumulate=1"],
}


@dataclass(frozen=True)
class Subject:
    """A training script with its settings.

    Args:
        script: "detector", "diffusion" or "classifier".
        config: the settings, see settings_of.
    """

    script: str
    config: EasyDict

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return tuple(self.config.dataset.get("crop") or self.config.dataset.input_size)

    def build(self) -> nn.Module:
        """The network, with random weights, on the CPU."""
        if self.script == "detector":
            return build_realnet(self.config, "checkpoint")
        if self.script == "diffusion":
            return create_diffusion_unet(**{**model_kwargs(self.config.unet), "pertrain_path": None})
        kwargs = {**model_kwargs(self.config.classifier), "pertrain_path": None}
        return create_classifier_unet(**kwargs, image_size=self.size)

    def batch(self, images: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Made-up images (N,3,H,W). Of a detector's, all differ from their normal version, which costs most."""
        batch = {"image": drawn(images, 3, *self.size).to(device)}
        if self.script == "detector":
            mask = torch.zeros(images, 1, *self.size, device=device)
            mask[:, :, : self.size[0] // 4, : self.size[1] // 4] = 1
            return {**batch, "gt_image": drawn(images, 3, *self.size, seed=1).to(device), "mask": mask}
        return {**batch, "label": torch.zeros(images, dtype=torch.long, device=device)}

    def training(self, network: nn.Module, run: Run) -> Training:
        """The training of a network that is on its device."""
        epoch_loss = EpochLoss(run.device) if self.script == "diffusion" else None
        parts = [network.recon, network.rrs] if self.script == "detector" else None
        return set_up_training(self.config, network, run, {}, ("", ""), epoch_loss=epoch_loss, compiled=parts)

    def step(self, training: Training, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
        """A function that makes one optimiser step, as the script does."""
        board = SimpleNamespace()
        if self.script == "detector":
            criterion = build_criterion(self.config.criterion, DETECTOR_LOSSES)
            return lambda: train_realnet.train_one_epoch(training, criterion, [batch], board, SAVER, None)
        process = SpacedDiffusion(**self.config.TrainSampler)
        script = train_diffusion if self.script == "diffusion" else train_classifier
        return lambda: script.train_one_epoch(training, process, [batch], board, SAVER)

    def loss(self, network: nn.Module, batch: dict[str, torch.Tensor], precision: str) -> float:
        """The loss of a batch before any step; timesteps and noise are the same on every device."""
        image, device = batch["image"], batch["image"].device
        with autocast(device, precision):
            if self.script == "detector":
                outputs = network(batch, train=True)
                return sum(loss(outputs) for loss in build_criterion(self.config.criterion).values()).item()
            process = SpacedDiffusion(**self.config.TrainSampler)
            t = torch.linspace(0, process.num_timesteps - 1, len(image)).long().to(device)
            noise = drawn(*image.shape, seed=2).to(device)
            if self.script == "diffusion":
                losses = process.training_losses(network, image, t, {"y": batch["label"]}, noise)
                return losses["loss"].mean().item()
            logits = network(process.q_sample(image, t, noise), process.model_timesteps(t))
            return F.cross_entropy(logits.float(), batch["label"]).item()


def settings_of(script: str, path: Path, *overrides: str, batch: int = 1) -> Subject:
    """A script's settings from a YAML file."""
    return Subject(script, load_config(path, [*QUIET[script], BATCH.format(batch), *overrides], FILES[script]))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampler_of(unet: nn.Module, classifier: nn.Module, size: tuple[int, int], precision: str, steps: int) -> Sampler:
    """sample.py's sampler with guidance, of networks that are on their device."""
    for network in (unet, classifier):
        network.requires_grad_(False).eval()
    device = next(unet.parameters()).device
    process = SpacedDiffusion(1000, f"ddim{steps}", "linear")
    guidance = classifier_guidance(classifier, 1.0, precision)
    return Sampler(process, unet, guidance, "ancestral", precision, size, 0, device)


def sample(sampler: Sampler, images: int) -> torch.Tensor:
    """Images (N,3,H,W) of class 0."""
    generators = [torch.Generator().manual_seed(i) for i in range(images)]
    return sampler.sample(0, torch.full((images,), 0.1), generators)


@torch.no_grad()
def predict(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Anomaly maps (N,1,H,W) of images (N,3,H,W), as predict.py computes them."""
    return network({"image": images})["anomaly_score"]
