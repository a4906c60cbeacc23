"""Frozen ImageNet backbones: torchvision networks tapped at named layers (RealNet, section 3)."""

import logging
import math
import pickle
import re
import ssl
import sys
import urllib.error
import urllib.parse
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from models import timm_backbones
from models.padding import set_padding
from utils import distributed
from utils.checkpoint import load_checkpoint, state_dict_of, tensor_problem
from utils.config import did_you_mean, shortened
from utils.errors import RunError, UsageError

log = logging.getLogger("realnet")

PRETRAIN_DIR = "pretrain"
# Weights files of timm 0.5.4; their tensor names are the same as torchvision's.
TIMM_FILES = {
    "resnet18": "resnet18-5c106cde.pth",
    "resnet34": "resnet34-43635321.pth",
    "resnet50": "resnet50_a1_0-14fe96d1.pth",
    "wide_resnet50_2": "wide_resnet50_racm-8234f177.pth",
}
# The reference program's names of layers, where torchvision's differ (those of timm's feature_info).
LAYERS = {
    "efficientnet_b4": {f"layer{i}": f"features.{stage}" for i, stage in enumerate((1, 2, 3, 5, 7), start=1)},
}
UNLOADED = ("random", "checkpoint")  # values of weights that name no file
UNIT_SCALE = ("resnet", "wide_resnet", "resnext")


class Backbone(nn.Module):
    """Features of a frozen torchvision classification network, always in eval mode.

    Networks of tokens give maps, too: Swin's hold the channels last, and those of vision transformers are one token per
    patch of an image of their own size.

    Args:
        backbone: torchvision's name, e.g. wide_resnet50_2 or squeezenet1_1; or timm/<name> of a transformer, e.g.
            timm/vit_small_patch14_dinov2.lvd142m (see timm_backbones).
        outlayers: names of the layers to tap, e.g. ["layer1", "layer2"] or ["features.4"].
        weights: "auto" (pretrain/, then torchvision's download), a file, "random" (calibrate before use), or
            "checkpoint" (left as they are, since a RealNet checkpoint will fill them).
        standardize: subtract each channel's mean and divide by the layer's deviation, as measured by AFS.init_indexes;
            None means on for all networks but ResNets, whose features have unit scale.
        padding: what its convolutions see beyond the border (see padding.set_padding).

    Attributes:
        channels, strides: number of channels and stride of each layer, both measured.
        own_size: (height, width) that images are resized to, for networks of tokens; None: any size.

    Shape:
        (N, 3, H, W) ImageNet-normalised RGB -> {layer: (N, channels[layer], h, w)}

    Example:
        >>> backbone = Backbone("resnet18", ["layer1", "layer3"], weights="random")
        >>> backbone.channels, backbone.strides
        ({'layer1': 64, 'layer3': 256}, {'layer1': 4, 'layer3': 16})

    Raises:
        UsageError: unknown network or layer, or a weights file that does not fit.
        RunError: the weights are missing and cannot be downloaded.
    """

    def __init__(
        self,
        backbone: str,
        outlayers: Sequence[str],
        weights: str = "auto",
        standardize: bool | None = None,
        padding: str = "zeros",
    ) -> None:
        super().__init__()
        self.name = backbone
        self.standardize = not backbone.startswith(UNIT_SCALE) if standardize is None else standardize
        self.needs_calibration = weights == "random"
        self.layouts: dict[str, str | None] = {}
        if backbone.startswith(timm_backbones.PREFIX):
            self._tap_timm(backbone.removeprefix(timm_backbones.PREFIX), outlayers, weights)
        else:
            self._tap_torchvision(backbone, outlayers, weights)
        set_padding(self.feature_extractor, padding, "net.backbone.kwargs.padding")
        self.requires_grad_(False)
        self.eval()
        self.channels, self.strides = self._probe()
        self.mean, self.std = nn.Module(), nn.Module()
        if self.standardize:
            for layer, channels in self.channels.items():
                self.mean.register_buffer(key(layer), torch.zeros(channels))
                self.std.register_buffer(key(layer), torch.ones(()))

    def _tap_timm(self, name: str, outlayers: Sequence[str], weights: str) -> None:
        path = None
        if weights not in UNLOADED:
            path = self._weights_file(weights)
        state = None if path is None else timm_backbones.read_weights(path)
        self.feature_extractor = timm_backbones.TimmTokens(name, outlayers, state)
        self.own_size = self.feature_extractor.own_size
        if path is not None:
            log.info("%s: loaded the weights of %s", path, self.name)

    def _tap_torchvision(self, backbone: str, outlayers: Sequence[str], weights: str) -> None:
        network = _build_network(backbone)
        side = getattr(network, "image_size", None)
        self.own_size = (side, side) if isinstance(side, int) else None
        try:
            layers = LAYERS.get(backbone, {})
            nodes = {layers.get(name, name): name for name in outlayers}
            self.feature_extractor = create_feature_extractor(network, nodes)
        # A name is also tried as a pattern.
        except (ValueError, re.error):
            names = [name for name, _ in network.named_modules() if name]
            wrong = next((name for name in outlayers if layers.get(name, name) not in names), outlayers[0])
            short = [name for name in names if name.count(".") <= 1]
            hint = did_you_mean(wrong, names) or f"; it has {', '.join(short)}"
            raise UsageError(f"structure: idx {shortened(wrong)} is no layer of {backbone}{hint}") from None
        if weights not in UNLOADED:
            self._load(self._weights_file(weights))

    def _weights_file(self, weights: str) -> Path:
        if weights == "auto":
            return find_weights(self.name)
        if not Path(weights).is_file():
            advice = "name another file, or set weights: auto, which looks in pretrain/ and else downloads"
            raise UsageError(f"{weights}, the weights of {self.name}, does not exist; {advice}")
        return Path(weights)

    def _load(self, path: Path) -> None:
        state = state_dict_of(load_checkpoint(path))
        # Old files lack num_batches_tracked, which nothing reads in eval mode.
        need = {k: v for k, v in self.feature_extractor.state_dict().items() if not k.endswith("num_batches_tracked")}
        missing = [
            name
            for name, own in need.items()
            if name not in state or state[name].shape != own.shape or tensor_problem(state[name], own.dtype)
        ]
        if missing:
            fit = len(need) - len(missing)
            raise UsageError(
                f"{path}: {fit} of {len(need)} tensors fit {self.name}, {missing[0]} does not; check net.backbone"
            )
        self.feature_extractor.load_state_dict({name: state[name] for name in need}, strict=False)
        log.info("%s: loaded the weights of %s", path, self.name)

    @torch.no_grad()
    def _probe(self) -> tuple[dict[str, int], dict[str, int]]:
        """Measure the channels and strides of the layers with one square image, in units of one of 256x256."""
        device = next(self.feature_extractor.parameters()).device
        try:
            features = self.feature_extractor(torch.zeros(1, 3, *(self.own_size or (256, 256)), device=device))
        except (AssertionError, RuntimeError) as error:
            where = "net.backbone.kwargs.backbone"
            raise UsageError(f"{where}: {self.name} does not take images of this size ({error})") from None
        maps = {}
        for layer, feature in features.items():
            self.layouts[layer] = _layout(feature)
            if self.layouts[layer] is None:
                shape = tuple(feature.shape) if torch.is_tensor(feature) else type(feature).__name__
                raise UsageError(f"structure: {self.name}'s {layer} outputs {shape}, neither a feature map nor tokens")
            maps[layer] = _as_map(feature, self.layouts[layer])
        channels = {layer: feature.shape[1] for layer, feature in maps.items()}
        return channels, {layer: round(256 / feature.shape[2]) for layer, feature in maps.items()}

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode, so that the frozen network keeps its BatchNorm statistics."""
        return super().train(False)

    @torch.no_grad()
    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features that are not standardised."""
        if self.own_size:
            images = F.interpolate(images, self.own_size, mode="bilinear", align_corners=False)
        if images.device.type == "cpu" and not torch.compiler.is_exporting():
            # Inference on a CPU is faster with the channels last, up to twice for some networks (docs/performance.md).
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.feature_extractor(images)
        return {layer: _as_map(feature, self.layouts[layer]) for layer, feature in features.items()}

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.maps(images)
        if not self.standardize:
            return features
        return {
            layer: (feature - getattr(self.mean, key(layer))[:, None, None]) / getattr(self.std, key(layer))
            for layer, feature in features.items()
        }

    @torch.no_grad()
    def calibrate(self, batches: Iterable[torch.Tensor], most: int) -> None:
        """Measure the BatchNorm statistics of randomly initialised weights on training images, over all ranks.

        Args:
            batches: ImageNet-normalised images (N,3,H,W).
            most: number of batches to use.
        """
        norms = [m for m in self.feature_extractor.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        for images in islice(batches, most):
            self.maps(images)
        for norm in norms:
            norm.eval()
            norm.momentum = 0.1
            distributed.all_reduce_mean(norm.running_mean)
            distributed.all_reduce_mean(norm.running_var)
        self.needs_calibration = False
        log.warning("%s: RANDOM weights, features are not pretrained (net.backbone.kwargs.weights: random)", self.name)

    def standardization(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What forward subtracts from a layer's features (C,), and what it then divides them by (scalar)."""
        if self.standardize:
            return getattr(self.mean, key(layer)), getattr(self.std, key(layer))
        return torch.zeros(self.channels[layer]), torch.ones(())

    def set_standardization(self, mean: dict[str, torch.Tensor], std: dict[str, torch.Tensor]) -> None:
        """Set the statistics that forward uses: mean[layer] (C,), std[layer] scalar."""
        for layer in self.channels:
            getattr(self.mean, key(layer)).copy_(mean[layer])
            getattr(self.std, key(layer)).copy_(std[layer])


def _layout(feature: object) -> str | None:
    """How the features of a square image are laid out: a map (N,C,h,w), channels last, tokens (N,1+hw,C), or None."""
    if not torch.is_tensor(feature):
        return None
    if feature.dim() == 4:
        # A square image has square maps.
        first, second, third = feature.shape[1:]
        return "map" if second == third else "channels last" if first == second else None
    square = feature.dim() == 3 and math.isqrt(feature.shape[1] - 1) ** 2 == feature.shape[1] - 1
    return "tokens" if square else None


def _as_map(feature: torch.Tensor, layout: str) -> torch.Tensor:
    """Features as (N,C,h,w); the class token, which comes first, has no place in it."""
    if layout == "map":
        return feature
    if layout == "channels last":
        return feature.permute(0, 3, 1, 2)
    side = math.isqrt(feature.shape[1] - 1)
    return feature[:, 1:].transpose(1, 2).unflatten(2, (side, side))


class FeatureStatistics:
    """Running per-channel means and layer deviations of features, over batches and ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, features: dict[str, torch.Tensor]) -> None:
        for layer, feature in features.items():
            flat = feature.float().transpose(0, 1).flatten(1)
            count = torch.full_like(flat[:, 0], flat.shape[1])
            # Sum over batches on the CPU: not every device has float64.
            new = torch.stack([flat.sum(1), (flat**2).sum(1), count]).cpu().double()
            self.sums[layer] = self.sums[layer] + new if layer in self.sums else new

    def result(self, across_ranks: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Means (C,) and scalar deviation of each layer, on the CPU; the deviation is around the channels' means."""
        mean, std = {}, {}
        for layer, sums in self.sums.items():
            total = distributed.all_reduce_mean(sums.clone()) if across_ranks else sums
            layer_mean = total[0] / total[2]
            variance = (total[1] / total[2] - layer_mean**2).mean()
            mean[layer] = layer_mean.float()
            std[layer] = variance.clamp(min=1e-12).sqrt().float()
        return mean, std


def key(layer: str) -> str:
    """A layer's name as part of a tensor's name, which may not contain dots."""
    return layer.replace(".", "_")


def _build_network(name: str) -> nn.Module:
    if name not in torchvision.models.list_models(torchvision.models):
        known = [n for n in torchvision.models.list_models(torchvision.models) if n.startswith(name[:4])]
        raise UsageError(
            f"net.backbone.kwargs.backbone: torchvision has no {name!r}"
            + (f"; it has {', '.join(known)}" if known else "")
        )
    return torchvision.models.get_model(name, weights=None)


def find_weights(name: str) -> Path:
    """Find a network's weights file in pretrain/, under timm's or torchvision's name, or download it to there.

    Args:
        name: as for Backbone.

    Rank 0 looks and downloads; all ranks get its answer.

    Raises:
        RunError: the file is missing and cannot be downloaded.
    """
    return distributed.on_main(lambda: _find_or_download(name))


def missing_weights(name: str) -> str | None:
    """Which file is missing, in words, if a network's weights are not in pretrain/; None if they are.

    Rank 0 looks; all ranks get its answer.
    """
    known = name.startswith(timm_backbones.PREFIX) or name in torchvision.models.list_models(torchvision.models)
    if not known or distributed.on_main(lambda: _in_pretrain(name)):
        return None
    return f"{PRETRAIN_DIR}/{_weights_files(name)[0]}, the weights of {name}, is missing; there is {_at_hand()}"


def _weights_files(name: str) -> list[str]:
    """Names that a network's weights file may have, timm's and torchvision's."""
    if name.startswith(timm_backbones.PREFIX):
        return [f"{name.removeprefix(timm_backbones.PREFIX)}.{ending}" for ending in timm_backbones.ENDINGS]
    urls = [choice.url for choice in torchvision.models.get_model_weights(name)]
    files = [TIMM_FILES[name]] if name in TIMM_FILES else []
    return files + [Path(urllib.parse.urlparse(url).path).name for url in urls]


def _in_pretrain(name: str) -> Path | None:
    paths = (Path(PRETRAIN_DIR) / file for file in _weights_files(name))
    return next((path for path in paths if path.is_file()), None)


def _at_hand() -> str:
    """Which weights are in pretrain/, in words."""
    files = sorted(path.name for path in Path(PRETRAIN_DIR).glob("*.pt*"))
    more = ", ..." if len(files) > 6 else ""
    return f"{', '.join(files[:6])}{more}" if files else "no weights"


def _find_or_download(name: str) -> Path:
    if name.startswith(timm_backbones.PREFIX):
        return timm_backbones.find_or_download(name.removeprefix(timm_backbones.PREFIX), Path(PRETRAIN_DIR))
    found = _in_pretrain(name)
    if found is not None:
        return found
    # Published results were measured with the first generation of ImageNet weights.
    first = next(iter(torchvision.models.get_model_weights(name)))
    path = Path(PRETRAIN_DIR) / Path(urllib.parse.urlparse(first.url).path).name
    try:
        first.get_state_dict(model_dir=PRETRAIN_DIR, check_hash=True, progress=sys.stderr.isatty(), weights_only=True)
    except (urllib.error.URLError, ssl.SSLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        problem = getattr(error, "reason", error)
        raise RunError(
            f"{path} is missing and cannot be downloaded ({problem}). Fetch {first.url} and put it into {PRETRAIN_DIR}/"
            f", which holds {_at_hand()}"
        ) from error
    return path
