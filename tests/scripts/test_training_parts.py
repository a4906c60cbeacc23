"""What the training scripts and sample.py hand to their parts: which weights, timesteps, gradients and settings.

Small stand-ins take the networks' place and record what reaches them.
"""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import nn

import train_classifier
import train_diffusion
import train_realnet
import utils.training
from datasets.build import build_realnet_train_set, build_sdas_dataset
from evaluation import validation
from models import build_realnet
from models.losses import DETECTOR_LOSSES, build_criterion
from models.sdas import SpacedDiffusion, create_classifier_unet, create_diffusion_unet
from models.sdas import sampler as sdas_sampler
from models.sdas.sampler import set_up_sampler
from models.sdas.trained import load_networks
from tests.conftest import CLASSES, CLASSIFIER, UNET
from tests.scripts.conftest import ALONE, training_of
from utils.checkpoint import save_checkpoint
from utils.errors import Stopped, UsageError
from utils.optim import EpochLoss, Stepper
from utils.precision import check_forward_precision, training_precision
from utils.signals import StopRequest

CPU = torch.device("cpu")
SAVER = SimpleNamespace(after_step=lambda: None)
# 10 of 1000 timesteps: 0, 100, .. 900.
TENTH = SpacedDiffusion(1000, "ddim10", "linear")


class Recorder(nn.Module):
    """Stands in for a U-Net or classifier (N,outputs) and records what it is called with."""

    def __init__(self, outputs: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, outputs or 6, 3, padding=1)
        self.pooled = outputs is not None
        self.timesteps: list[int] = []
        self.precisions: list[torch.dtype | None] = []
        self.layouts: list[bool] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        self.timesteps += t.tolist()
        self.precisions.append(autocast_dtype())
        self.layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        out = self.conv(x)
        return out.mean(dim=(2, 3)) if self.pooled else out


def autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def sdas_batches(count: int, size: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(size, 3, 8, 8, generator=generator) * 2 - 1,
            "label": torch.arange(size) % 2,
            "index": torch.arange(size) + size * k,
        }
        for k in range(count)
    ]


def diffusion_epoch(config, network: Recorder, batches: list) -> None:
    training = training_of(config, network, epoch_loss=EpochLoss(CPU))
    train_diffusion.train_one_epoch(training, TENTH, batches, MagicMock(), SAVER)


def classifier_epoch(config, network: Recorder, batches: list) -> None:
    train_classifier.train_one_epoch(training_of(config, network), TENTH, batches, MagicMock(), SAVER)


# ---- averaged weights ------------------------------------------------------------------------------------------------


def filled(network: nn.Module, value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in network.state_dict().items()}


def values_of(network: nn.Module) -> set[float]:
    return {value for tensor in network.state_dict().values() for value in tensor.flatten().tolist()}


@pytest.mark.parametrize("averaged", [True, False])
def test_sampling_uses_the_averaged_weights_if_there_are_any(averaged, configured, monkeypatch, tmp_path):
    networks = {
        "unet": (create_diffusion_unet(**UNET), UNET),
        "classifier": (create_classifier_unet(**CLASSIFIER, image_size=16), CLASSIFIER),
    }
    overrides = []
    for section, (network, arch) in networks.items():
        content = {"arch": arch, "classes": list(CLASSES), "state_dict": filled(network, 0.25)}
        if averaged:
            content["ema_state_dict"] = filled(network, 0.75)
        save_checkpoint(tmp_path / f"{section}.pth.tar", content)
        overrides.append(f"{section}.pertrain_path={tmp_path}/{section}.pth.tar")
    config = configured("sample", *overrides)
    guides = []
    monkeypatch.setattr(
        sdas_sampler, "classifier_guidance", lambda classifier, scale, precision: guides.append(classifier)
    )
    sampler = set_up_sampler(config, ALONE, load_networks(config))
    expected = {0.75 if averaged else 0.25}
    assert values_of(sampler.unet) == expected
    assert [values_of(guide) for guide in guides] == [expected]


def test_the_diffusion_validation_uses_the_averaged_network(configured, tmp_path):
    config = configured("diffusion")
    test_set = build_sdas_dataset(config.dataset, "test", list(CLASSES), 0)
    # A raw network that has diverged does not show in the pictures of the averaged one.
    training = training_of(config, Recorder())
    nn.init.constant_(training.network.conv.weight, float("nan"))
    board = MagicMock()
    train_diffusion.validate(training, test_set, list(CLASSES), board, tmp_path, StopRequest(ALONE))
    assert training.network.timesteps == []
    assert set(training.ema.model.timesteps) == {0, 250, 500, 750}
    assert all(np.isfinite(call.args[1]) for call in board.add_scalar.call_args_list)
    assert board.add_scalar.call_count == 1


def test_the_newest_pictures_of_the_diffusion_validation_are_kept(configured, tmp_path):
    config = configured("diffusion", "saver.keep_pictures=2")
    test_set = build_sdas_dataset(config.dataset, "test", list(CLASSES), 0)
    training = training_of(config, Recorder())
    for training.progress.epoch in (8, 9, 3):
        train_diffusion.validate(training, test_set, list(CLASSES), MagicMock(), tmp_path, StopRequest(ALONE))
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_9", "epoch_3"}
    assert {path.name for path in (tmp_path / "epoch_3").iterdir()} == {f"{name}.png" for name in CLASSES}


def test_drawing_samples_ends_at_a_signal(configured):
    stop = StopRequest(ALONE)
    stop.signal = 15
    with pytest.raises(Stopped):
        train_diffusion.sample_rows(training_of(configured("diffusion"), Recorder()), TENTH, 0, (16, 16), stop)


@pytest.mark.parametrize(
    ("types", "stop_grad", "frozen"),
    [
        (["FeatureMSELoss"], False, "rrs"),
        (["SegmentFocalLoss"], True, "recon"),
        (["SegmentFocalLoss"], False, None),
        (["SegmentCrossEntropyLoss", "FeatureMSELoss"], True, None),
    ],
)
def test_what_no_loss_reaches_is_frozen_and_told(types, stop_grad, frozen, configured, caplog):
    criterion = f"criterion=[{', '.join(f'{{name: {name}, type: {name}}}' for name in types)}]"
    config = configured("realnet", criterion, f"net.rrs.kwargs.stop_grad={stop_grad}")
    network = build_realnet(config, "checkpoint")
    with caplog.at_level("WARNING", logger="realnet"):
        train_realnet.freeze_untrained(network, config)
    for name in ("recon", "rrs"):
        trained = [parameter.requires_grad for parameter in getattr(network, name).parameters()]
        assert set(trained) == {name != frozen}
    assert (f"{frozen}, which is frozen" in caplog.text) == (frozen is not None)


def test_the_classifier_is_validated_with_averaged_weights_if_there_are_any(configured):
    for decay in ("null", "0.5"):
        training = training_of(configured("classifier", f"trainer.ema_decay={decay}"), Recorder(2))
        train_classifier.validate(training, TENTH, sdas_batches(1), MagicMock(), StopRequest(ALONE))
        used, unused = training.network, training.ema and training.ema.model
        if training.ema is not None:
            used, unused = unused, used
        assert len(used.timesteps) == 4 * train_classifier.T_BINS
        assert unused is None or unused.timesteps == []


# ---- accumulated gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "epoch", "outputs"),
    [("diffusion", diffusion_epoch, None), ("classifier", classifier_epoch, 2)],
    ids=["diffusion", "classifier"],
)
def test_accumulated_batches_are_averaged(script, epoch, outputs, configured, monkeypatch):
    """7 batches in steps of 3, 3 and 1, each batch with a loss of 1."""
    losses, steps = [], []
    backward, step = Stepper.backward, Stepper.step
    monkeypatch.setattr(Stepper, "backward", lambda self, loss: losses.append(loss.item()) or backward(self, loss))
    monkeypatch.setattr(Stepper, "step", lambda self, *args: steps.append(len(losses)) or step(self, *args))

    def one(model: nn.Module, image: torch.Tensor, t: torch.Tensor, kwargs: dict) -> dict[str, torch.Tensor]:
        return {"loss": model(image, t, **kwargs).mean(dim=(1, 2, 3)) * 0 + 1}

    monkeypatch.setattr(TENTH, "training_losses", one)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, label: logits.mean() * 0 + 1)
    epoch(configured(script, "trainer.accumulate=3"), Recorder(outputs), sdas_batches(7))
    assert losses == pytest.approx([1 / 3] * 6 + [1])
    assert steps == [3, 6, 7]


# ---- AFS -------------------------------------------------------------------------------------------------------------


def test_afs_sees_anomalous_images_only(configured):
    overrides = ["net.afs.kwargs.init_bsn=5", "dataset.train.anomaly_types={normal: 0.99, dtd: 0.01}"]
    config = configured("realnet", *overrides)
    train_set = build_realnet_train_set(config.dataset, "dots", 0)
    batches = []

    def init_indexes(backbone: nn.Module, loader: object, count: int, moments: None) -> dict:
        del backbone, moments
        assert count == 5
        batches.extend(loader)
        return {}

    network = SimpleNamespace(
        backbone=SimpleNamespace(needs_calibration=False),
        afs=SimpleNamespace(init_indexes=init_indexes),
        subspaces=dict,
    )
    train_realnet.prepare_features(network, train_set, config, ALONE, MagicMock(), StopRequest(ALONE))
    assert len(batches) >= 5
    assert all(batch["changed"].all() and batch["mask"].any() for batch in batches)
    # Training still gets normal images.
    assert not all(train_set[0, i]["changed"] for i in range(len(train_set)))


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"amp": "off"}, "off"),
        ({"amp": "bf16"}, "bf16"),
        ({"amp": "fp16"}, "fp16"),
        ({"amp": "off", "use_fp16": True}, "fp16"),
        ({"amp": "bf16", "use_fp16": True}, "bf16"),
    ],
)
def test_the_precision_is_the_one_that_is_set(trainer, expected):
    assert training_precision(EasyDict(trainer), CPU) == expected


def test_automatic_precision_depends_on_the_device(monkeypatch):
    for native, expected in ((True, "bf16"), (False, "off")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert training_precision(EasyDict(amp="auto"), CPU) == expected
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **kwargs: native)
        assert training_precision(EasyDict(amp="auto"), torch.device("cuda")) == expected
    with pytest.raises(UsageError, match="half"):
        training_precision(EasyDict(amp="half"), CPU)


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch):
    def lacking(*args: object) -> None:
        raise RuntimeError("not implemented for 'Half'")

    check_forward_precision("bf16", CPU)
    monkeypatch.setattr(torch.nn.functional, "conv2d", lacking)
    check_forward_precision("fp32", CPU)
    with pytest.raises(UsageError, match=r"--precision fp16: cpu has no convolutions in it .*; use fp32"):
        check_forward_precision("fp16", CPU)
    with pytest.raises(UsageError, match="is not one of fp32, bf16, fp16"):
        check_forward_precision("auto", CPU)


@pytest.mark.parametrize("validate", [validation.validate_test, validation.validate_held_out])
def test_validations_run_in_float32_whatever_the_training_s_precision_is(validate, configured):
    class Network(nn.Linear):
        def forward(self, batch: dict) -> dict[str, torch.Tensor]:
            seen.append(autocast_dtype())
            return {"anomaly_score": batch["image"][:, :1] * torch.nan}

    seen: list[torch.dtype | None] = []
    training = training_of(configured("realnet", "trainer.amp='bf16'"), Network(1, 1))
    images = SimpleNamespace(samples=[], preprocessing=None)
    batch = {"image": torch.zeros(1, 3, 8, 8), "index": torch.zeros(1).long(), "mask": torch.zeros(1, 8, 8)}
    result = validate(training, images, [batch], MagicMock(), StopRequest(ALONE))
    assert result in (validation.DIVERGED, (validation.DIVERGED, None))
    assert seen == [None]


@pytest.mark.parametrize(("amp", "dtype"), [("off", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_trainings_run_in_the_precision_that_is_set(amp, dtype, configured, monkeypatch):
    scaled = []

    def recorded(network: nn.Module, optimizer: torch.optim.Optimizer, precision: str, *rest: object):
        scaled.append(precision)
        return Stepper(network, optimizer, precision, *rest)

    monkeypatch.setattr(utils.training, "Stepper", recorded)
    unet, classifier = Recorder(), Recorder(2)
    diffusion_epoch(configured("diffusion", f"trainer.amp='{amp}'"), unet, sdas_batches(1))
    classifier_epoch(configured("classifier", f"trainer.amp='{amp}'"), classifier, sdas_batches(1))

    class Detector(nn.Linear):
        def forward(self, batch: dict, train: bool) -> torch.Tensor:
            seen.append((autocast_dtype(), train))
            return self.weight.sum()

    seen = []
    training = training_of(configured("realnet", f"trainer.amp='{amp}'"), Detector(1, 1))
    train_realnet.train_one_epoch(training, {"loss": lambda out: out}, sdas_batches(1), MagicMock(), SAVER, None)
    assert seen == [(dtype, True)]
    assert unet.precisions == classifier.precisions == [dtype]
    assert training.precision == amp
    assert scaled == [amp] * 3


# ---- layout and compilation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("script", ["diffusion", "classifier", "realnet"])
def test_channels_last_is_the_layout_of_the_weights(script, wanted, configured):
    training = training_of(configured(script, f"trainer.channels_last={wanted}"), nn.Sequential(nn.Conv2d(3, 4, 3)))
    weight = training.network[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == wanted
    assert weight.is_contiguous() != wanted


@pytest.mark.parametrize("wanted", [True, False])
def test_channels_last_is_the_layout_of_the_diffusion_model_s_images(wanted, configured):
    network = Recorder()
    diffusion_epoch(configured("diffusion", f"trainer.channels_last={wanted}"), network, sdas_batches(1))
    assert network.layouts == [wanted]


@pytest.fixture
def quick_compiler(monkeypatch):
    """Capture graphs as for compilation, but run them as they are. Gives the compiled modules."""
    compiled, original = [], nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module: compiled.append(module) or original(module, backend="eager")
    )
    yield compiled
    torch.compiler.reset()


def trained(script: str, config) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors after a few steps."""
    torch.manual_seed(0)
    if script == "realnet":
        network = build_realnet(config)
        training = training_of(config, network, compiled=[network.recon, network.rrs])
        generator = torch.Generator().manual_seed(0)
        # The number of images that differ from their normal version changes from step to step.
        batches = [
            {
                "image": torch.randn(2, 3, 64, 64, generator=generator),
                "gt_image": torch.randn(2, 3, 64, 64, generator=generator),
                "mask": torch.ones(2, 1, 64, 64),
                "changed": torch.arange(2) < count,
            }
            for count in (1, 2)
        ]
        criterion = build_criterion(config.criterion, DETECTOR_LOSSES)
        train_realnet.train_one_epoch(training, criterion, batches, MagicMock(), SAVER, None)
    else:
        network = create_diffusion_unet(**UNET)
        training = training_of(config, network, epoch_loss=EpochLoss(CPU))
        train_diffusion.train_one_epoch(training, TENTH, sdas_batches(2), MagicMock(), SAVER)
    return training.checkpoint()["state_dict"]


@pytest.mark.parametrize("script", ["diffusion", "realnet"])
def test_a_compiled_training_has_the_same_checkpoint(script, configured, quick_compiler):
    plain = trained(script, configured(script))
    assert quick_compiler == []
    compiled = trained(script, configured(script, "trainer.compile=True"))
    assert [type(part).__name__ for part in quick_compiler] == (
        ["UNet"] if script == "diffusion" else ["ReconstructionLayer", "RRS"]
    )
    assert list(compiled) == list(plain)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, msg=name)


# ---- timesteps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["training", "validation"])
def test_the_classifier_sees_the_timesteps_of_the_full_process(phase, configured):
    network, config = Recorder(2), configured("classifier")
    if phase == "training":
        classifier_epoch(config, network, sdas_batches(20))
    else:
        training = training_of(config, network)
        train_classifier.validate(training, TENTH, sdas_batches(1), MagicMock(), StopRequest(ALONE))
    assert set(network.timesteps) == set(range(0, 1000, 100))


def test_the_diffusion_model_sees_the_timesteps_of_the_full_process(configured):
    network = Recorder()
    diffusion_epoch(configured("diffusion"), network, sdas_batches(20))
    assert set(network.timesteps) == set(range(0, 1000, 100))
