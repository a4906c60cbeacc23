"""RealNet: backbone -> AFS -> reconstruction -> RRS (Zhang, Xu, Zhou, CVPR 2024, arXiv 2403.05897)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.afs import AFS, Block
from models.backbones import Backbone
from models.recon import ReconstructionLayer, SimpleReconstructionLayer
from models.rrs import RRS
from models.scoring import AnomalyScore
from models.subspace import NormalSubspace
from utils.config import call_with_settings
from utils.device import to_device
from utils.errors import UsageError

RECONSTRUCTIONS = {
    "models.recon.ReconstructionLayer": ReconstructionLayer,
    "models.recon.SimpleReconstructionLayer": SimpleReconstructionLayer,
}
PARTS = {
    "backbone": ("models.backbones.Backbone",),
    "afs": ("models.afs.AFS",),
    "recon": tuple(RECONSTRUCTIONS),
    "rrs": ("models.rrs.RRS",),
}
# The reference stores these measured values in its checkpoints' settings; here they are measured again.
MEASURED = ("outlayers", "structure", "inplanes", "instrides", "init_bsn")


class RealNet(nn.Module):
    """The whole detector.

    Shape of the batch:
        image (N,3,H,W) ImageNet-normalised RGB, anomalous where mask (N,1,H,W) is 1. In training also gt_image
        (N,3,H,W), its normal version, and optionally changed (N,) bool on the CPU: whether the two differ; if they do
        not, they pass the backbone as one image.

    Returns:
        block_feats, feats_recon, residual: {block: (N,C,h,w)}; logit (N,2,H,W); anomaly_score (N,1,H,W) in [0,1].
        In training also gt_block_feats, and the batch's mask.
    """

    def __init__(
        self, backbone: Backbone, afs: AFS, recon: nn.Module, rrs: RRS, score: AnomalyScore | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.afs = afs
        self.recon = recon
        self.rrs = rrs
        self.score = score or AnomalyScore({})

    def forward(self, batch: dict[str, torch.Tensor], train: bool = False) -> dict[str, Any]:
        image = batch["image"]
        size = tuple(image.shape[-2:])
        outputs: dict[str, Any] = {}
        with torch.no_grad():
            if train:
                outputs["block_feats"], outputs["gt_block_feats"] = self._paired_features(batch)
                outputs["mask"] = batch["mask"]
            else:
                outputs["block_feats"] = self.afs(self.backbone(image), size)
        features = outputs["block_feats"]
        reconstructed = self.recon(features)
        outputs["feats_recon"] = reconstructed
        # float32: rounding to half precision would leave little of the difference of two values that are nearly equal.
        outputs["residual"] = {
            block: (features[block].float() - reconstructed[block].float()) ** 2 for block in features
        }
        outputs["logit"] = self.rrs(outputs["residual"], size).float()
        outputs["anomaly_score"] = self.score(outputs)
        return outputs

    def subspaces(self) -> dict[str, list[NormalSubspace]]:
        """The subspaces that AFS's pass has to fit, by block: those that recon begins with, and the score's."""
        parts = [self.recon] if self.recon.start == "subspace" else []
        parts += [self.score.novelty] if self.score.novelty is not None else []
        blocks = [block.name for block in self.afs.structure] if parts else []
        return {block: [part.subspace(block) for part in parts] for block in blocks}

    def _paired_features(self, batch: dict[str, torch.Tensor]) -> tuple[dict, dict]:
        """Block features of A and I, with one backbone pass over the distinct images."""
        image, gt_image = batch["image"], batch["gt_image"]
        n, size = len(image), tuple(image.shape[-2:])
        if "changed" in batch:
            # Make the index on the CPU: nonzero() on the device would wait for the device.
            index = to_device(batch["changed"].cpu().nonzero().flatten(), image.device)
            gt_image = gt_image.index_select(0, index)
        else:
            index = torch.arange(n, device=image.device)
        both = self.afs(self.backbone(torch.cat([image, gt_image])), size)
        features = {block: f[:n] for block, f in both.items()}
        return features, {block: f[:n].index_copy(0, index, f[n:]) for block, f in both.items()}


class ExportedRealNet(nn.Module):
    """A trained RealNet with plain tensors as inputs and outputs, for other runtimes.

    Args:
        network: a RealNet in eval mode.
        window: (height, width) of the average pooling whose maximum is the image score.

    Shape:
        image (N,3,H,W) -> anomaly map (N,H,W) in [0,1], score (N,)
    """

    def __init__(self, network: RealNet, window: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.window = window

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.network({"image": image})["anomaly_score"]
        k_y, k_x = (min(k, side) for k, side in zip(self.window, image.shape[-2:], strict=True))
        # Rows, then columns: k_y + k_x additions for each mean instead of k_y * k_x.
        means = F.avg_pool2d(F.avg_pool2d(maps, (1, k_x), stride=1), (k_y, 1), stride=1)
        return maps[:, 0], means.amax(dim=(1, 2, 3))


def parse_structure(structure: Sequence[dict], channels: dict[str, int] | None = None) -> list[Block]:
    """Convert the YAML's `structure` to Blocks.

    Args:
        channels: channels of each layer, to check `planes` against.

    Raises:
        UsageError: a key is missing, a layer has fewer channels, or the strides do not fit.
    """
    blocks = []
    for i, block in enumerate(structure):
        try:
            layers = tuple((str(layer["idx"]), int(layer["planes"])) for layer in block["layers"])
            blocks.append(Block(str(block["name"]), layers, int(block["stride"])))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"structure: block {i} must have the form {{name, layers: [{{idx, planes}}, ...], stride}} ({error})"
            ) from None
        for layer, planes in layers:
            if planes < 1:
                raise UsageError(f"structure: {block['name']} keeps {planes} channels of {layer}; at least 1 is needed")
            if channels and planes > channels[layer]:
                raise UsageError(
                    f"structure: {block['name']} keeps {planes} of {layer}, which has {channels[layer]} channels"
                )
    if not blocks:
        raise UsageError("structure: at least one block is needed")
    finest = min(block.stride for block in blocks)
    for block in blocks:
        if block.stride < 1 or block.stride % finest:
            raise UsageError(
                f"structure: {block.name}'s stride {block.stride} is not a multiple of the finest stride, {finest}"
            )
    return blocks


def check_realnet(config: dict) -> None:
    """Raise the errors of build_realnet for these settings, without the time and memory to build the network."""
    with torch.device("meta"):
        build_realnet(config, "checkpoint")


def build_realnet(config: dict, backbone_weights: str | None = None) -> RealNet:
    """Build RealNet from a loaded realnet.yaml.

    Args:
        config: has `net`, `structure` and, if the score is not the discriminator's, `evaluator`; `net` may be the
            reference's saved `arch`, with the structure in afs's kwargs.
        backbone_weights: overrides net.backbone.kwargs.weights; "checkpoint" when a state_dict will be loaded.

    Raises:
        UsageError: a part is missing, unknown or does not fit the others.
        RunError: pretrained weights are missing and cannot be downloaded.

    Example:
        >>> from utils.config import load_config
        >>> model = build_realnet(load_config("experiments/demo/realnet.yaml"), "checkpoint").eval()
        >>> outputs = model({"image": torch.zeros(2, 3, 96, 128)})
        >>> outputs["anomaly_score"].shape
        torch.Size([2, 1, 96, 128])
    """
    parts = {part["name"]: part for part in config["net"]}
    for name, types in PARTS.items():
        if name not in parts or parts[name]["type"] not in types:
            raise UsageError(f"net: needs a part named {name} of type {' or '.join(types)}")
    kwargs = {name: dict(parts[name].get("kwargs") or {}) for name in PARTS}
    structure = config.get("structure") or kwargs["afs"].get("structure")
    if not structure:
        raise UsageError("structure: missing; list the blocks, their layers and strides")
    kwargs = {name: {k: v for k, v in values.items() if k not in MEASURED} for name, values in kwargs.items()}
    if backbone_weights:
        kwargs["backbone"]["weights"] = backbone_weights

    outlayers = list(dict.fromkeys(layer for block in parse_structure(structure) for layer, _ in block.layers))
    backbone = call_with_settings("net.backbone.kwargs", Backbone, outlayers=outlayers, **kwargs["backbone"])
    blocks = parse_structure(structure, backbone.channels)
    planes = {block.name: block.planes for block in blocks}
    strides = {block.name: block.stride for block in blocks}
    afs = AFS(blocks, backbone.channels)
    recon = call_with_settings("net.recon.kwargs", RECONSTRUCTIONS[parts["recon"]["type"]], planes, **kwargs["recon"])
    rrs = call_with_settings("net.rrs.kwargs", RRS, planes, strides, **kwargs["rrs"])
    score = AnomalyScore(planes, (config.get("evaluator") or {}).get("score", "discriminator"))
    return RealNet(backbone, afs, recon, rrs, score)
