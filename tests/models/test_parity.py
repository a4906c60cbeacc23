"""Agreement with recorded outputs: the reference program's, and our own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.metrics import anomaly_metrics
from models import build_realnet
from models.losses import build_criterion
from models.sdas import SpacedDiffusion, create_classifier_unet, create_diffusion_unet
from tests.rule_filled import fill, names_and_shapes, randn, relative_error

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
COMPAT, OWN = FIXTURES / "compat", FIXTURES / "recorded.npz"


def case(name: str) -> dict:
    return json.loads((COMPAT / f"{name}.json").read_text())


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(COMPAT / f"{name}.npz") as stored:
        return dict(stored)


def with_random_backbone(net: list[dict]) -> dict:
    next(part for part in net if part["name"] == "backbone")["kwargs"]["weights"] = "random"
    return {"net": net}


def realnet_batch(size: int = 128) -> dict[str, torch.Tensor]:
    return {
        "image": randn(9, 2, 3, size, size),
        "gt_image": randn(10, 2, 3, size, size),
        "mask": (randn(11, 2, 1, size, size) > 1).float(),
    }


LOSSES = build_criterion(
    [
        {"name": "loss_ce", "type": "SegmentCrossEntropyLoss"},
        {"name": "loss_mse", "type": "FeatureMSELoss"},
        {"name": "loss_focal", "type": "SegmentFocalLoss", "kwargs": {"gamma": 2}},
        {"name": "loss_focal25", "type": "SegmentFocalLoss", "kwargs": {"gamma": 2, "alpha": 0.25}},
    ]
)


@pytest.mark.parametrize(
    ("name", "create", "inputs"),
    [
        ("unet_a", create_diffusion_unet, (randn(1, 2, 3, 64, 64), torch.tensor([7, 901]), torch.tensor([0, 2]))),
        ("classifier_attention", create_classifier_unet, (randn(2, 2, 3, 64, 64), torch.tensor([7, 901]))),
    ],
)
def test_sdas_networks_equal_the_reference(name, create, inputs):
    recorded = case(name)
    network = create(**recorded["kwargs"])
    assert names_and_shapes(network) == recorded["state"]
    with torch.no_grad():
        assert relative_error(fill(network)(*inputs), arrays(name)["out"]) < 1e-4


@pytest.mark.parametrize(
    ("name", "create"),
    [("unet_default_names", create_diffusion_unet), ("classifier_default_names", create_classifier_unet)],
)
def test_sdas_tensor_names_at_full_size(name, create):
    recorded = case(name)
    with torch.device("meta"):
        assert names_and_shapes(create(**recorded["kwargs"])) == recorded["state"]


def test_realnet_tensor_names_at_full_size():
    recorded = case("realnet_default_names")
    with torch.device("meta"):
        assert names_and_shapes(build_realnet(with_random_backbone(recorded["net"]))) == recorded["state"]


def test_schedule_equals_the_reference():
    process = SpacedDiffusion(1000, "ddim20", "linear")
    for name, expected in arrays("schedule_ddim20_linear").items():
        np.testing.assert_allclose(getattr(process, name), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["realnet_a", "realnet_simple"])
def test_realnet_equals_the_reference(name):
    recorded = case(name)
    network = build_realnet(with_random_backbone(recorded["net"]))
    assert names_and_shapes(network) == recorded["state"]
    with torch.no_grad():
        outputs = fill(network)(realnet_batch(), train=True)
    got = {key: loss(outputs) for key, loss in LOSSES.items()}
    got |= {"logit": outputs["logit"], "anomaly_score": outputs["anomaly_score"]}
    for block in outputs["block_feats"]:
        got[f"feats_{block}"] = outputs["block_feats"][block][:1]
        got[f"gtfeats_{block}"] = outputs["gt_block_feats"][block][:1]
        got[f"recon_{block}"] = outputs["feats_recon"][block]
        got[f"residual_mean_{block}"] = outputs["residual"][block].mean(dim=(2, 3))
    expected = arrays(name)
    assert set(expected) <= set(got)
    for key, value in expected.items():
        # Arrays recorded in half precision need a larger tolerance.
        assert relative_error(got[key], value) < (1e-3 if value.dtype == np.float16 else 1e-4), key


def test_afs_keeps_the_reference_channels():
    network = fill(build_realnet(with_random_backbone(case("realnet_a")["net"])))
    batches = [
        {
            "image": randn(100 + k, 2, 3, 128, 128),
            "gt_image": randn(200 + k, 2, 3, 128, 128),
            "mask": (randn(300 + k, 2, 1, 128, 128) > 0.5).float(),
        }
        for k in range(2)
    ]
    network.afs.init_indexes(network.backbone, batches, 2)
    for name, expected in arrays("realnet_a_afs").items():
        np.testing.assert_array_equal(getattr(network.afs.indexes, name), expected)


def test_metrics_equal_the_recorded_ones():
    recorded = arrays("metrics")
    got = anomaly_metrics(recorded.pop("scores"), recorded.pop("masks"))
    for name, expected in recorded.items():
        assert got[name] == pytest.approx(float(expected), abs=1e-9), name


# ---- our own recordings, made when all tests above passed ------------------------------------------------------------

SMALL_UNET = {
    "classifier_width": 32,
    "classifier_depth": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "class_number": 2,
    "num_head_channels": 32,
}


def small_classifier(pool: str) -> torch.nn.Module:
    kwargs = {key: value for key, value in SMALL_UNET.items() if key != "attention_resolutions"}
    return create_classifier_unet(**kwargs, classifier_attention_resolutions=[2], classifier_pool=pool, image_size=16)


def small_realnet(recon: dict) -> torch.nn.Module:
    backbone = {"backbone": "resnet18", "weights": "random"}
    layers = [{"idx": "layer1", "planes": 32}, {"idx": "layer2", "planes": 32}]
    return build_realnet(
        {
            "structure": [{"name": "block1", "layers": layers, "stride": 4}],
            "net": [
                {"name": "backbone", "type": "models.backbones.Backbone", "kwargs": backbone},
                {"name": "afs", "type": "models.afs.AFS"},
                {"name": "recon", **recon},
                {"name": "rrs", "type": "models.rrs.RRS", "kwargs": {"mode_numbers": [8, 8]}},
            ],
        }
    )


@torch.no_grad()
def small_outputs() -> dict[str, torch.Tensor]:
    """A few outputs of each network, with rule-filled weights."""
    x, t = randn(1, 2, 3, 16, 16), torch.tensor([7, 901])
    outputs = {"unet": fill(create_diffusion_unet(**SMALL_UNET))(x, t, torch.tensor([0, 1]))[:, :, ::5, ::5]}
    plain = create_diffusion_unet(**SMALL_UNET, use_scale_shift_norm=False, resblock_updown=False)
    outputs["unet_plain"] = fill(plain)(x, t, torch.tensor([0, 1]))[:, :, ::5, ::5]
    for pool in ("attention", "adaptive", "spatial", "spatial_v2"):
        outputs[f"classifier_{pool}"] = fill(small_classifier(pool))(x, t)
    unet = {
        "type": "models.recon.ReconstructionLayer",
        "kwargs": {"num_res_blocks": 1, "channel_mult": [1, 2], "attention_mult": [2]},
    }
    for name, recon in (("unet", unet), ("simple", {"type": "models.recon.SimpleReconstructionLayer"})):
        result = fill(small_realnet(recon))(realnet_batch(64), train=True)
        outputs[f"realnet_{name}"] = result["logit"][:, :, ::13, ::13]
        outputs |= {f"realnet_{name}_{key}": loss(result) for key, loss in LOSSES.items()}
    return outputs


def test_networks_equal_our_recordings():
    outputs = small_outputs()
    with np.load(OWN) as recorded:
        assert set(recorded) == set(outputs)
        for name in recorded:
            assert relative_error(outputs[name], recorded[name]) < 1e-4, name


if __name__ == "__main__":
    OWN.parent.mkdir(exist_ok=True)
    np.savez_compressed(OWN, **{name: value.numpy() for name, value in small_outputs().items()})
