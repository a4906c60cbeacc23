"""Vision transformers of timm as backbones, DINOv2 and DINOv3 above all: an optional extra."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint import load_checkpoint, state_dict_of
from utils.config import did_you_mean, shortened
from utils.errors import RunError, UsageError
from utils.files import write_atomic

PREFIX = "timm/"  # of net.backbone.kwargs.backbone
TOKENS = 16  # per side
ENDINGS = ("safetensors", "pth", "pt", "bin")
_BLOCK = re.compile(r"blocks\.(\d+)")


class TimmTokens(nn.Module):
    """The tokens after some blocks of a vision transformer, as maps.

    Args:
        name: timm's name after "timm/", e.g. vit_small_patch14_dinov2.lvd142m.
        layers: names blocks.<index>, from 0.
        state: tensors of a weights file, or None to leave the weights random.

    Attributes:
        own_size: (height, width) of the images that it takes: 16 patches per side.

    Shape:
        (N,3,*own_size) -> {layer: (N,C,16,16)}

    Raises:
        RunError: timm is not installed.
        UsageError: it has no such network or block, or the weights do not fit.
    """

    def __init__(self, name: str, layers: Sequence[str], state: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        timm = _timm()
        if not timm.is_model(name):
            known = timm.list_models("*dinov[23]*", pretrained=True)
            raise UsageError(f"net.backbone.kwargs.backbone: timm has no {shortened(name)}{did_you_mean(name, known)}")
        self.indices = [_index_of(layer) for layer in layers]
        self.layers = list(layers)
        side = TOKENS * _patch_of(name)
        self.own_size = (side, side)
        self.network = _created(timm, name, side, state)
        blocks = len(getattr(self.network, "blocks", []))
        if not blocks or not hasattr(self.network, "forward_intermediates"):
            raise UsageError(f"net.backbone.kwargs.backbone: timm's {name} is no transformer with blocks of tokens")
        beyond = next((layer for layer, index in zip(layers, self.indices, strict=True) if index >= blocks), None)
        if beyond:
            raise UsageError(
                f"structure: idx {beyond} is no layer of {name}, which has blocks.0 to blocks.{blocks - 1}"
            )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        # Ascending and once each, as timm returns them.
        wanted = sorted(set(self.indices))
        maps = self.network.forward_intermediates(images, indices=wanted, intermediates_only=True, stop_early=True)
        by_index = dict(zip(wanted, maps, strict=True))
        return {layer: by_index[index] for layer, index in zip(self.layers, self.indices, strict=True)}


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise RunError(
            f"net.backbone.kwargs.backbone: {PREFIX}... needs the package {error.name}: "
            "pip install -r requirements-backbones.txt"
        ) from None
    return timm


def _index_of(layer: str) -> int:
    match = _BLOCK.fullmatch(layer)
    if match is None:
        raise UsageError(f"structure: idx {shortened(layer)}: layers of timm's transformers are blocks.<number>")
    return int(match[1])


def _patch_of(name: str) -> int:
    """The side of a patch in pixels, as the name of the network says; else 16."""
    match = re.search(r"patch(\d+)", name)
    return int(match[1]) if match else 16


def _created(timm: Any, name: str, side: int, state: dict[str, torch.Tensor] | None) -> nn.Module:
    options: dict[str, Any] = {"img_size": side, "num_classes": 0}
    if state is not None:
        # timm fits the position embedding to this number of patches.
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
    try:
        return timm.create_model(name, **options)
    except (TypeError, RuntimeError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UsageError(f"net.backbone: timm's {name} cannot be built with these weights ({reason})") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a checkpoint, without running anything in it.

    Raises:
        UsageError: it is not there or not readable.
    """
    if path.suffix != ".safetensors":
        return state_dict_of(load_checkpoint(path))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a readable safetensors file ({str(error)[:120]})") from None


def find_or_download(name: str, folder: Path) -> Path:
    """The file of a network's weights in a folder, as <name>.safetensors or .pth; else downloaded to there.

    Raises:
        RunError: it is missing and cannot be downloaded.
    """
    timm = _timm()
    for ending in ENDINGS:
        if (folder / f"{name}.{ending}").is_file():
            return folder / f"{name}.{ending}"
    path = folder / f"{name}.safetensors"
    config = timm.models.get_pretrained_cfg(name)
    source = f"https://huggingface.co/{config.hf_hub_id}" if config and config.hf_hub_id else "its authors' page"
    try:
        from huggingface_hub import hf_hub_download

        downloaded = hf_hub_download(config.hf_hub_id, "model.safetensors")
        write_atomic(path, lambda part: shutil.copyfile(downloaded, part))
    # Of the network, of the hub, of the disk: a dozen types.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        advice = f"Fetch model.safetensors of {source} and save it there"
        raise RunError(f"{path} is missing and cannot be downloaded ({reason}). {advice}") from None
    return path
