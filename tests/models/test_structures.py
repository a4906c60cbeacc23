"""The structures that prepare_data.py --backbone writes."""

import sys

import pytest
import torch

from evaluation.cost import backbone_weights
from models import build_realnet
from models.backbones import Backbone
from models.losses import DETECTOR_LOSSES, build_criterion
from models.structures import STRUCTURES, structure_of
from tests.conftest import REPOSITORY
from utils.config import load_config
from utils.errors import RunError, UsageError


@pytest.mark.parametrize("backbone", STRUCTURES)
def test_a_detector_with_this_backbone_trains_a_step(backbone):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm", reason="an optional extra: pip install -r requirements-backbones.txt")
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


def test_weights_that_are_not_there_are_named_with_their_setting(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.pth, the weights of resnet18, does not exist; .* weights: auto"):
        Backbone("resnet18", ["layer1"], weights=str(tmp_path / "gone.pth"))


SMALL = "vit_small_patch14_dinov2.lvd142m"


def test_weights_of_timm_are_read_from_a_file_at_another_size(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm", reason="an optional extra: pip install -r requirements-backbones.txt")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    # The published weights are for 37x37 patches.
    published = timm.create_model(SMALL, img_size=518, num_classes=0).state_dict()
    (tmp_path / "pretrain").mkdir()
    save_file(published, tmp_path / "pretrain" / f"{SMALL}.safetensors")
    torch.save(published, tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    images = torch.rand(1, 3, 224, 224)
    maps = []
    for weights in ("auto", str(tmp_path / "weights.pth")):
        backbone = Backbone(f"timm/{SMALL}", ["blocks.7", "blocks.1"], weights, standardize=False)
        maps.append(backbone.maps(images))
        assert backbone.channels == {"blocks.7": 384, "blocks.1": 384}
    assert maps[0]["blocks.7"].shape == (1, 384, 16, 16)
    assert torch.equal(maps[0]["blocks.1"], maps[1]["blocks.1"])
    # Blocks come in the order of their names, whatever order timm returns them in.
    assert not torch.equal(maps[0]["blocks.1"], maps[0]["blocks.7"])
    kept = backbone.feature_extractor.network.blocks[1].mlp.fc1.weight
    assert torch.equal(kept, published["blocks.1.mlp.fc1.weight"])


def test_the_weights_of_timm_s_networks_are_found_as_others_are(tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="an optional extra: pip install -r requirements-backbones.txt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain").mkdir()
    (tmp_path / f"pretrain/{SMALL}.safetensors").write_bytes(b"weights")
    net = [{"name": "backbone", "kwargs": {"backbone": f"timm/{SMALL}"}}]
    assert backbone_weights(net)["weights"] == f"pretrain/{SMALL}.safetensors"


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("vit_small_patch14_dinov9", "blocks.1", "timm has no 'vit_small_patch14_dinov9'"),
        (
            SMALL,
            "blocks.12",
            "idx blocks.12 is no layer of vit_small_patch14_dinov2.lvd142m, which has blocks.0 to blocks.11",
        ),
        (SMALL, "layer1", "idx 'layer1': layers of timm's transformers are blocks.<number>"),
        ("resnet18", "blocks.1", "timm's resnet18 "),
    ],
)
def test_what_timm_cannot_give_is_one_error(name, layer, message):
    pytest.importorskip("timm", reason="an optional extra: pip install -r requirements-backbones.txt")
    with pytest.raises(UsageError) as error:
        Backbone(f"timm/{name}", [layer], "random")
    assert message in str(error.value)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RunError, match=r"needs the package timm: pip install -r requirements-backbones.txt"):
        Backbone(f"timm/{SMALL}", ["blocks.1"], "random")


def test_weights_of_timm_that_cannot_be_downloaded_are_named(tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="an optional extra: pip install -r requirements-backbones.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError) as error:
        Backbone(f"timm/{SMALL}", ["blocks.1"])
    text = str(error.value)
    assert text.startswith(f"pretrain/{SMALL}.safetensors is missing and cannot be downloaded")
    assert f"Fetch model.safetensors of https://huggingface.co/timm/{SMALL} and save it there" in text


def test_an_unknown_backbone_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"--backbone resnet52: no structure is known for it; did you mean resnet50\?"):
        structure_of("resnet52")
