"""The structures that prepare_data.py --backbone writes."""

import pytest
import torch

from models import build_realnet
from models.backbones import Backbone
from models.losses import DETECTOR_LOSSES, build_criterion
from models.structures import STRUCTURES, structure_of
from tests.conftest import REPOSITORY
from utils.config import load_config
from utils.errors import UsageError


@pytest.mark.parametrize("backbone", STRUCTURES)
def test_a_detector_with_this_backbone_trains_a_step(backbone):
    config = load_config(REPOSITORY / "experiments/presets/quick.yaml", script="realnet")
    config.structure = structure_of(backbone)
    config.net[0].kwargs = {"backbone": backbone, "weights": "random"}
    torch.manual_seed(0)
    network = build_realnet(config)
    for block in config.structure:
        layer = block["layers"][0]
        # SqueezeNet does not pad, so its maps are a little smaller.
        if network.backbone.own_size is None:
            assert network.backbone.strides[layer["idx"]] == pytest.approx(block["stride"], rel=0.1)
        assert network.backbone.channels[layer["idx"]] >= layer["planes"]
    images = torch.rand(2, 3, 64, 64)
    mask = torch.zeros(2, 1, 64, 64)
    mask[:, :, 16:48, 16:48] = 1
    batch = {"image": images * (1 - mask), "gt_image": images, "mask": mask}
    network.backbone.calibrate([images], 1)
    network.afs.init_indexes(network.backbone, [batch], 1)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    criterion = build_criterion(config.criterion, DETECTOR_LOSSES)
    before = [p.clone() for p in parameters]
    sum(loss(network(batch, train=True)) for loss in criterion.values()).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in parameters)
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_tokens_become_maps_where_they_lie():
    """A bright square moves the features below it, and no others as much."""
    for name, layer in (("vit_b_16", "encoder.layers.encoder_layer_0"), ("swin_t", "features.1")):
        torch.manual_seed(0)
        backbone = Backbone(name, [layer], weights="random", standardize=False)
        images = torch.zeros(1, 3, 224, 224)
        images[:, :, 32:64, 128:192] = 5
        (before,), (after,) = (backbone.maps(x)[layer] for x in (images * 0, images))
        change = (after - before).abs().mean(dim=0)
        height, width = change.shape
        rows, columns = slice(height // 7, 2 * height // 7), slice(4 * width // 7, 6 * width // 7)
        outside = change.clone()
        outside[max(0, rows.start - 2) : rows.stop + 2, max(0, columns.start - 2) : columns.stop + 2] = 0
        assert change[rows, columns].mean() > 3 * outside.mean()
        assert change[rows, columns].min() > outside.median()


def test_an_unknown_backbone_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"--backbone resnet52: no structure is known for it; did you mean resnet50\?"):
        structure_of("resnet52")
