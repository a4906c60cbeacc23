"""Backbone, AFS, reconstruction and RRS: behaviour beyond the parity cases."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from models import backbones, build_realnet
from models.afs import AFS, Block, channel_losses
from models.backbones import Backbone
from models.losses import SegmentFocalLoss, build_criterion
from models.recon import ReconstructionLayer, SimpleReconstructionLayer
from models.rrs import RRS
from tests.conftest import REALNET
from tests.rule_filled import fill, randn
from utils.errors import RunError, UsageError
from utils.precision import cast_weights

# ---- backbone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "channels", "strides"),
    [
        ("resnet18", ["layer1", "layer4"], [64, 512], [4, 32]),
        ("wide_resnet50_2", ["layer1", "layer2", "layer3", "layer4"], [256, 512, 1024, 2048], [4, 8, 16, 32]),
        ("efficientnet_b4", ["features.2", "features.5"], [32, 160], [4, 16]),
        ("squeezenet1_1", ["features.4", "features.12"], [128, 512], [4, 17]),
        ("mobilenet_v3_small", ["features.3"], [24], [8]),
        ("convnext_tiny", ["features.1", "features.3"], [96, 192], [4, 8]),
    ],
)
def test_channels_and_strides_are_measured(name, layers, channels, strides):
    with torch.device("meta"):
        backbone = Backbone(name, layers, weights="random")
    assert list(backbone.channels.values()) == channels
    assert list(backbone.strides.values()) == strides


def test_unknown_layers_and_networks_are_refused_with_the_known():
    with pytest.raises(UsageError, match=r"idx 'layer5' is no layer of resnet18; did you mean layer4\?"):
        Backbone("resnet18", ["layer5"], weights="random")
    with pytest.raises(UsageError, match="resnet18"):
        Backbone("resnet17", ["layer1"], weights="random")


def test_a_layer_without_a_feature_map_is_refused():
    with pytest.raises(UsageError, match="feature map"):
        Backbone("resnet18", ["fc"], weights="random")


def test_weights_from_a_file_with_torchvision_s_names(tmp_path):
    network = fill(torchvision.models.resnet18(weights=None))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    backbone = Backbone("resnet18", ["layer2"], weights=str(tmp_path / "w.pth"))
    x = randn(0, 1, 3, 64, 64)
    with torch.no_grad():
        expected = network.layer2(network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(x))))))
        torch.testing.assert_close(backbone(x)["layer2"], expected)
    assert not backbone.needs_calibration


def test_a_weights_file_of_another_network_is_refused(tmp_path):
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"w\.pth: 0 of"):
        Backbone("resnet18", ["layer1"], weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["wide_resnet50_racm-8234f177.pth", "wide_resnet50_2-95faca4d.pth"])
def test_auto_finds_timm_s_and_torchvision_s_files(tmp_path, monkeypatch, offline, name):
    monkeypatch.setattr(backbones, "PRETRAIN_DIR", str(tmp_path))
    (tmp_path / name).touch()
    assert backbones.find_weights("wide_resnet50_2") == tmp_path / name


def test_auto_offline_names_the_file_and_where_to_put_it(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(backbones, "PRETRAIN_DIR", str(tmp_path))
    with pytest.raises(RunError) as error:
        backbones.find_weights("wide_resnet50_2")
    assert "https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_calibrated_and_logged(caplog):
    backbone = Backbone("resnet18", ["layer1", "layer2"], weights="random")
    images = [3 + 2 * randn(k, 4, 3, 64, 64) for k in range(3)]
    with caplog.at_level("WARNING", logger="realnet"):
        backbone.calibrate(images, 3)
    assert "not pretrained" in caplog.text
    features = backbone.feature_extractor.bn1(backbone.feature_extractor.conv1(torch.cat(images)))
    assert features.mean().abs() < 0.05
    assert features.std() == pytest.approx(1.0, abs=0.1)


def test_the_backbone_never_trains():
    network = build_realnet(REALNET).train()
    assert not any(module.training for module in network.backbone.modules())
    assert not any(parameter.requires_grad for parameter in network.backbone.parameters())
    assert network.rrs.training


def test_standardisation_brings_features_to_unit_scale():
    config = copy.deepcopy(REALNET)
    config["net"][0]["kwargs"] = {"backbone": "squeezenet1_1", "weights": "random"}
    config["structure"] = [{"name": "b", "layers": [{"idx": "features.4", "planes": 64}], "stride": 8}]
    network = build_realnet(config)
    assert network.backbone.standardize
    images = [50 * randn(k, 2, 3, 64, 64) for k in range(2)]
    batches = [{"image": i + 9, "gt_image": i, "mask": torch.ones(2, 1, 64, 64)} for i in images]
    network.afs.init_indexes(network.backbone, batches, 2)
    feature = network.backbone(torch.cat(images))["features.4"]
    torch.testing.assert_close(feature.mean(dim=(0, 2, 3)), torch.zeros(128), atol=1e-4, rtol=0)
    assert feature.var(dim=(0, 2, 3), correction=0).mean() == pytest.approx(1.0, abs=1e-3)
    # The statistics are saved in the checkpoint.
    assert {"backbone.mean.features_4", "backbone.std.features_4"} <= set(network.state_dict())


def test_resnets_are_not_standardised():
    assert not any("mean." in name for name in build_realnet(REALNET).state_dict())


# ---- AFS -------------------------------------------------------------------------------------------------------------


def test_channel_losses_equal_their_definition():
    difference, masks = randn(0, 2, 3, 4, 4), (randn(1, 2, 1, 8, 8) > 0).float()
    got = channel_losses(difference, masks, (4, 4))
    for c in range(3):
        squared = difference[:, c] ** 2
        scaled = (squared - squared.min()) / (squared.max() - squared.min() + 1e-4)
        assert got[c] == pytest.approx(((scaled - masks[:, 0, ::2, ::2]) ** 2).mean().item(), rel=1e-5)


class Echo(nn.Module):
    """A backbone with four channels, which react to the anomaly with the gains 0, 1, 0.2 and NaN."""

    standardize = False

    def maps(self, x):
        gains = torch.tensor([0.0, 1.0, 0.2, float("nan")])
        noise = 0.3 * torch.rand(x.shape[0], 4, *x.shape[2:])
        return {"layer": x[:, :1] * gains[:, None, None] + noise * torch.tensor([1, 0, 1, 1])[:, None, None]}


def test_afs_keeps_the_channels_that_react_to_the_anomaly():
    afs = AFS([Block("b", (("layer", 2),), 1)], {"layer": 4})
    mask = (randn(0, 4, 1, 8, 8) > 0.5).float()
    batch = {"image": mask.expand(-1, 3, -1, -1), "gt_image": torch.zeros(4, 3, 8, 8), "mask": mask}
    losses = afs.init_indexes(Echo(), [batch] * 5, 3)
    assert afs.indexes.b_layer.tolist() == [1, 2]
    assert losses["b_layer"][3] == float("inf")


def test_afs_selects_then_resizes_and_joins_layers():
    afs = AFS([Block("b", (("one", 2), ("two", 1)), 4)], {"one": 3, "two": 2})
    afs.indexes.b_one.copy_(torch.tensor([0, 2]))
    one, two = randn(0, 1, 3, 8, 8), randn(1, 1, 2, 4, 4)
    out = afs({"one": one, "two": two}, (32, 32))["b"]
    assert out.shape == (1, 3, 8, 8)
    assert torch.equal(out[:, :2], one[:, [0, 2]])
    assert out[0, 2, 0, 0] == two[0, 0, 0, 0]


# ---- reconstruction, RRS, whole network -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 10), (1, 5)])
def test_reconstruction_keeps_any_size(size):
    for layer in (ReconstructionLayer({"b": 64}, 1, 0.5, (1, 2, 4), (2, 4)), SimpleReconstructionLayer({"b": 32}, 1)):
        channels = 64 if isinstance(layer, ReconstructionLayer) else 32
        if size == (1, 5) and channels == 32:
            continue  # InstanceNorm needs more than one position
        x = randn(0, 2, channels, *size)
        assert layer({"b": x})["b"].shape == x.shape


def test_rrs_takes_the_channels_of_highest_equalised_maximum_and_mean():
    rrs = RRS({"a": 2, "b": 2}, {"a": 4, "b": 8}, ("max", "mean"), (1, 2), 1).eval()
    joined = torch.zeros(2, 4, 4, 4)
    joined[0, 1, 0, 0] = 9  # a peak
    joined[0, 3] = 1  # all over
    joined[0, 2] = 0.5
    joined[1, 2, 2, 2] = 5
    assert rrs.choose(joined).tolist()[0] == [1, 3, 1]
    assert rrs.choose(joined).tolist()[1][:2] == [2, 2]


def test_rrs_equalises_for_the_choice_only():
    rrs = RRS({"a": 32}, {"a": 4}, ("max",), (1,), 1).eval()
    rrs.bn_idx.running_var.fill_(1.0)
    rrs.bn_idx.running_var[0] = 1e6  # a channel that is high in every image
    joined = torch.rand(1, 32, 4, 4)
    joined[:, 0] = 20
    joined[0, 5, 1, 1] = 3
    assert rrs.choose(joined).tolist() == [[5]]


def test_stop_grad_keeps_the_discriminator_s_gradient_from_the_reconstruction():
    for stop_grad in (False, True):
        config = copy.deepcopy(REALNET)
        config["net"][3]["kwargs"]["stop_grad"] = stop_grad
        network = build_realnet(config)
        nn.init.normal_(network.recon.block1_recon.out[2].weight)
        logit = network({"image": randn(0, 2, 3, 64, 64)})["logit"]
        logit.square().sum().backward()
        reached = network.recon.block1_recon.out[2].weight.grad is not None
        assert reached != stop_grad


def test_weights_that_are_cast_once_give_what_autocast_gives():
    torch.manual_seed(0)
    network = build_realnet(REALNET).eval()
    nn.init.normal_(network.recon.block1_recon.out[2].weight)
    images, maps = randn(0, 2, 3, 64, 64), []
    for _ in range(2):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            maps.append(network({"image": images})["logit"])
        cast_weights(network, "bf16")
    assert torch.equal(*maps)
    assert network.recon.block1_recon.out[2].weight.dtype == torch.bfloat16
    assert network.rrs.decoder1[2].weight.dtype == torch.float32  # BatchNorm


def test_replicate_padding_makes_borders_of_a_uniform_image_like_its_middle():
    spread = {}
    for padding in ("zeros", "replicate"):
        config = copy.deepcopy(REALNET)
        for part in (0, 2, 3):
            config["net"][part]["kwargs"]["padding"] = padding
        torch.manual_seed(0)
        network = build_realnet(config).eval()
        with torch.inference_mode():
            outputs = network({"image": torch.full((1, 3, 70, 64), 0.7)})
        for name, values in (("features", outputs["block_feats"]["block1"]), ("logit", outputs["logit"])):
            values = values.flatten(2)
            spread[name, padding] = float((values.amax(dim=2) - values.amin(dim=2)).max() / values.abs().max())
    assert spread["features", "replicate"] < 1e-5 < 0.1 < spread["features", "zeros"]
    assert spread["logit", "replicate"] < 1e-5 < 0.1 < spread["logit", "zeros"]


def test_an_unknown_padding_names_its_setting():
    for part, name in ((0, "backbone"), (2, "recon"), (3, "rrs")):
        config = copy.deepcopy(REALNET)
        config["net"][part]["kwargs"]["padding"] = "mirror"
        with pytest.raises(UsageError, match=f"net.{name}.kwargs.padding: 'mirror' is not one of zeros, replicate"):
            build_realnet(config)


def batch(n=4, size=64):
    images = randn(0, n, 3, size, size)
    changed = torch.tensor([True, False] * (n // 2))
    gt = torch.where(changed[:, None, None, None], randn(1, n, 3, size, size), images)
    return {"image": images, "gt_image": gt, "mask": (randn(2, n, 1, size, size) > 1).float(), "changed": changed}


def test_equal_images_pass_the_backbone_once():
    network = build_realnet(REALNET).eval()
    seen = []
    network.backbone.feature_extractor.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    full = batch()
    short = network(full, train=True)
    long = network({key: value for key, value in full.items() if key != "changed"}, train=True)
    assert seen == [6, 8]
    for block, features in long["gt_block_feats"].items():
        torch.testing.assert_close(short["gt_block_feats"][block], features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (70, 45)])
def test_maps_have_the_size_of_the_image(size):
    network = build_realnet(REALNET).eval()
    outputs = network({"image": randn(0, 2, 3, *size)})
    assert outputs["logit"].shape == (2, 2, *size)
    assert outputs["anomaly_score"].shape == (2, 1, *size)
    assert outputs["anomaly_score"].min() >= 0
    assert outputs["anomaly_score"].max() <= 1
    assert set(outputs) == {"block_feats", "feats_recon", "residual", "logit", "anomaly_score"}


def test_the_residual_is_taken_in_float32():
    network = build_realnet(REALNET).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        outputs = network({"image": randn(0, 1, 3, 32, 32)})
    features, reconstructed = outputs["block_feats"]["block1"], outputs["feats_recon"]["block1"]
    assert torch.bfloat16 in (features.dtype, reconstructed.dtype)
    assert torch.equal(outputs["residual"]["block1"], (features.float() - reconstructed.float()) ** 2)
    assert outputs["anomaly_score"].dtype == torch.float32


def test_a_step_lowers_the_loss():
    torch.manual_seed(0)
    network = build_realnet(REALNET).train()
    criterion = build_criterion(REALNET["criterion"])
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        loss = sum(module(network(batch(), train=True)) for module in criterion.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_criterion_weights_scale_and_mistakes_are_named():
    outputs = build_realnet(REALNET).eval()(batch(), train=True)
    one, two = (
        build_criterion([{"name": "x", "type": "FeatureMSELoss", "kwargs": {"weight": w}}])["x"](outputs)
        for w in (1.0, 2.0)
    )
    torch.testing.assert_close(two, 2 * one)
    with pytest.raises(UsageError, match="Loss9"):
        build_criterion([{"name": "x", "type": "Loss9"}])
    with pytest.raises(UsageError, match="wieght"):
        build_criterion([{"name": "x", "type": "FeatureMSELoss", "kwargs": {"wieght": 1}}])


def test_the_reference_s_layers_of_efficientnet_are_known():
    layers = [f"layer{i}" for i in range(1, 6)]
    backbone = Backbone("efficientnet_b4", layers, weights="random", standardize=False)
    assert backbone.channels == dict(zip(layers, (24, 32, 56, 160, 448), strict=True))
    assert backbone.strides == dict(zip(layers, (2, 4, 8, 16, 32), strict=True))


def test_the_focal_loss_takes_the_reference_s_arguments():
    logit, mask = torch.randn(2, 2, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    outputs = {"logit": logit, "mask": mask}
    p = logit.softmax(1)
    of_true = torch.where(mask[:, 0] > 0, p[:, 1], p[:, 0])
    smooth = 1e-3
    of_true = of_true * (1 - smooth) + (1 - of_true) * smooth + smooth
    weights = torch.where(mask[:, 0] > 0, 0.75, 0.25)
    wanted = (-weights * (1 - of_true) ** 1.5 * of_true.log()).sum()
    loss = SegmentFocalLoss(alpha=[1, 3], gamma=1.5, smooth=smooth, size_average=False)
    torch.testing.assert_close(loss(outputs), wanted)
    by_number = SegmentFocalLoss(alpha=0.75, balance_index=1, gamma=1.5, smooth=smooth, size_average=False)
    torch.testing.assert_close(by_number(outputs), wanted)


def test_the_focal_loss_of_pixels_that_are_certain_has_a_gradient():
    logit = torch.tensor([-60.0, 60.0]).view(1, 2, 1, 1).requires_grad_()
    SegmentFocalLoss(gamma=0.5)({"logit": logit, "mask": torch.ones(1, 1, 1, 1)}).backward()
    assert logit.grad.isfinite().all()


@pytest.mark.parametrize("indices", [[0, 1, 64], [-1, 0, 1], [2, 2, 3]])
def test_indices_from_a_file_are_channels_and_different(indices):
    afs = AFS([Block("block1", (("layer1", 3),), 4)], {"layer1": 64})
    with pytest.raises(UsageError, match=r"afs\.indexes\.block1_layer1 has to hold different channels, 0 \.\. 63"):
        afs.load_state_dict({"indexes.block1_layer1": torch.tensor(indices)})
