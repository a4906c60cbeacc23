"""Steps of the program on a pretended GPU: a tensor on the wrong device fails here as it does on a real one.

Tensors on "cuda" are torch's fake tensors: they have a shape, a type and a device, but no values. Tensors on the CPU
are real. What is read from the GPU is all ones. Also noticed is what would wait for the GPU within a step.
Not covered: several ranks, compiled models, mixed precision.
"""

from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from easydict import EasyDict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import evaluation.detector
import train_classifier
import train_diffusion
import train_realnet
from datasets.build import build_realnet_test_set, build_realnet_train_set, build_sdas_dataset
from datasets.loaders import EpochBatches, SharedBatches, make_loader
from evaluation.detector import Detector, Tiles
from evaluation.trained_model import TrainedModel
from evaluation.validation import validate_test
from models import build_realnet
from models.afs import AFS
from models.losses import DETECTOR_LOSSES, build_criterion
from models.sdas import SpacedDiffusion, create_classifier_unet, create_diffusion_unet
from models.sdas.edit import GoodImage, edit_images
from models.sdas.guidance import classifier_guidance
from models.sdas.sampler import Sampler
from tests.conftest import CLASSES, CLASSIFIER, UNET
from utils.config import load_config
from utils.distributed import Run
from utils.meter import Meter
from utils.optim import EMA, EpochLoss, Stepper, build_optimizer
from utils.saver import Saver
from utils.signals import StopRequest
from utils.training import set_up_training

# torch warns of missing GPUs at autocast and pinned memory, and of deep copies of fake tensors.
pytestmark = pytest.mark.filterwarnings("ignore:.*(CUDA is not|no accelerator is|data pointer of FakeTensor)")

aten = torch.ops.aten
GPU = torch.device("cuda")
RUN = Run(0, 1, GPU)
COPIES = (aten.copy_.default, aten._foreach_copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class FakeGPU(FakeTensorMode):
    """While active, tensors on "cuda" are fake. Operations on the CPU alone run as usual."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.number = 1  # what item() and float() read from the GPU
        self.inside = False
        self.waits: list[str] = []  # operations that would wait for the GPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
        if func is aten._pin_memory.default:  # asks for a driver
            return args[0].clone()
        if not self.inside and waits_for_the_gpu(func, args, kwargs):
            self.waits.append(str(func))
        if on_gpu and func is aten._local_scalar_dense.default:
            return torch.tensor(self.number, dtype=args[0].dtype).item()
        if on_gpu and func is aten.nonzero.default:  # all ones: as many positions as elements
            return args[0].new_zeros(args[0].numel(), args[0].dim(), dtype=torch.long)
        if self.inside:  # fake operations consist of others, whose CPU tensors are fake as well
            return super().__torch_dispatch__(func, types, args, kwargs)
        if on_gpu:
            refuse_cpu_tensors(func, args, tensors)
        elif torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return func(*args, **kwargs)
        elif kwargs.get("generator") is not None and kwargs["generator"].device.type == "cpu":
            raise RuntimeError(f"{func}: a generator on the CPU for random numbers on the GPU")
        self.inside = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.inside = False
        return tree_map(ones_if_copied_to_the_cpu, result)


def waits_for_the_gpu(func, args: tuple, kwargs: dict) -> bool:
    """Whether the program would stand still until the GPU has done all that came before.

    Reading a number does, as does asking for positions (an index of booleans); and a copy, but not one to the GPU with
    non_blocking (from pinned memory, which nothing here can tell).
    """
    if not args or not isinstance(args[0], torch.Tensor):
        return False
    on_gpu = args[0].device.type == "cuda"
    if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default):
        return on_gpu
    if func in INDEXING:
        return on_gpu and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func is aten._to_copy.default:
        there = torch.device(kwargs.get("device") or args[0].device).type == "cuda"
        return on_gpu != there and (on_gpu or not kwargs.get("non_blocking"))
    if func is aten.copy_.default:
        from_gpu = args[1].device.type == "cuda"
        return on_gpu != from_gpu and (from_gpu or args[1].dim() > 0) and not (len(args) > 2 and args[2] and on_gpu)
    return False


def ones_if_copied_to_the_cpu(value: object) -> object:
    copied = isinstance(value, FakeTensor) and value.device.type == "cpu"
    return torch.ones(value.shape, dtype=value.dtype) if copied else value


def refuse_cpu_tensors(func, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Refuse CPU tensors in an operation on the GPU. Fake tensors alone let some pass, as in cpu_table[gpu_index]."""
    if func in INDEXING and args[0].device.type == "cuda":  # it may be indexed from the CPU
        tensors = [args[0], *args[2:3]]
    # A GPU reads single numbers from the CPU, but does not write to them.
    written = args[0] if func._schema.is_mutable else None
    if func not in COPIES and any(x.device.type == "cpu" and (x.dim() or x is written) for x in tensors):
        raise RuntimeError(f"{func}: some tensors are on the CPU, others on the GPU")


@pytest.fixture
def gpu(monkeypatch):
    """Pretend a GPU. Gradients are zeros, as torch's backward pass would ask the real device for its streams."""

    def backward(loss: torch.Tensor, *args: object, **kwargs: object) -> None:
        nodes, seen = [loss.grad_fn], {None}
        for node in nodes:
            if node not in seen:
                seen.add(node)
                nodes += [following for following, _ in node.next_functions]
                if hasattr(node, "variable"):  # a parameter
                    node.variable.grad = torch.zeros_like(node.variable)

    # All that is read from the GPU is 1, so indices would be the same.
    monkeypatch.setattr(AFS, "check_indexes", lambda self: None)
    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, leaf: [torch.zeros_like(leaf)])
    # In inference mode, fake tensors get operations such as to(device) as a whole, which they do not know.
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
    with FakeGPU() as fake:
        yield fake


@pytest.fixture
def configured(workspace, monkeypatch):
    """configured(script, "key=value", ...): the settings of a script on the small data set."""
    monkeypatch.chdir(workspace.root)
    common = "dataset.batch_size=8", "trainer.amp='off'", "trainer.print_freq_step=1", "trainer.max_bad_steps=1"
    return lambda script, *overrides: load_config(workspace.out / f"{script}.yaml", [*common, *overrides], script)


def loaders(config, train_set, test_set) -> tuple:
    size = config.dataset.batch_size
    train, test = EpochBatches(len(train_set), size, RUN, 0), SharedBatches(len(test_set), size, RUN)
    return make_loader(train_set, train, 0, RUN), make_loader(test_set, test, 0, RUN)


def resume(training) -> None:
    """Load a training's own state, as read from a checkpoint onto the CPU."""
    training.load_state_dict(tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, training.state_dict()))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda cpu, there: cpu + there,
        lambda cpu, there: there.add_(cpu),
        lambda cpu, there: cpu.sum().add_(there.sum()),
        lambda cpu, there: cpu[there.long()],
        lambda cpu, there: torch._foreach_lerp_([cpu], [there], 0.5),
        lambda cpu, there: torch.randn(3, generator=torch.Generator(), device=GPU),
        lambda cpu, there: nn.Linear(3, 1)(there),
        lambda cpu, there: there.numpy(),
        lambda cpu, there: np.asarray(there),
    ],
)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(mistake, gpu):
    cpu = torch.arange(3.0)
    there = cpu.to(GPU)
    assert cpu.tolist() == [0, 1, 2]
    assert there.cpu().numpy().tolist() == there[there > 0].tolist() == [1, 1, 1]
    assert float(there[cpu.long()].sum() * cpu.sum()) == 1
    with pytest.raises((RuntimeError, TypeError)):
        mistake(cpu, there)


OWN = ["net.recon.kwargs.start=subspace", "evaluator.score=both", "trainer.ema_decay=0.5"]
NOVELTY = ["net.recon.kwargs.start=subspace", "evaluator.score=residual+novelty"]


@pytest.mark.parametrize(
    ("standardize", "loss", "more"),
    [(False, "CrossEntropy", []), (True, "Focal", []), (True, "CrossEntropy", OWN), (True, "CrossEntropy", NOVELTY)],
)
def test_realnet_trains_and_validates(standardize, loss, more, gpu, configured, tmp_path):
    criterion = f"[{{name: mask, type: Segment{loss}Loss}}, {{name: features, type: FeatureMSELoss}}]"
    config = configured("realnet", f"net.backbone.kwargs.standardize={standardize}", f"criterion={criterion}", *more)
    train_set = build_realnet_train_set(config.dataset, "dots", 0)
    test_set = build_realnet_test_set(config.dataset, "dots")
    network, board, stop = build_realnet(config).to(GPU), MagicMock(), StopRequest(RUN)
    train_realnet.prepare_features(network, train_set, config, RUN, board, stop)
    training = set_up_training(config, network, RUN, {}, ("", ""), {"best_metric": -1.0})
    loader, test_loader = loaders(config, train_set, test_set)
    losses, saver = build_criterion(config.criterion, DETECTOR_LOSSES), Saver(tmp_path, training, stop)
    train_realnet.train_one_epoch(training, losses, loader, board, saver, tmp_path / "sheet.png")
    train_realnet.measure_normal(training, train_set, stop)
    assert validate_test(training, test_set, test_loader, board, stop) == 0.5
    resume(training)


@pytest.mark.parametrize("tiles", [None, Tiles(48, 8, 2)])
def test_the_detector_scores_images(tiles, gpu, configured, monkeypatch, tmp_path):
    config = configured("realnet")
    trained = TrainedModel(build_realnet(config).eval(), config, "", 1)
    monkeypatch.setattr(evaluation.detector, "load_trained", lambda *args: trained)
    monkeypatch.setattr(evaluation.detector.distributed, "pick_device", lambda name: GPU)
    (tmp_path / "ckpt_best.pth.tar").touch()
    (detection,) = Detector.load(tmp_path).detect([np.zeros((80, 70, 3), np.uint8)], tiles)
    assert detection.map.shape == (80, 70)
    assert detection.finite


def test_the_diffusion_model_trains_and_validates(gpu, configured, tmp_path):
    config = configured("diffusion", "TestSampler.section_counts=ddim2")
    train_set, test_set = (build_sdas_dataset(config.dataset, split, list(CLASSES), 0) for split in ("train", "test"))
    network, board, stop = create_diffusion_unet(**UNET).to(GPU), MagicMock(), StopRequest(RUN)
    training = set_up_training(config, network, RUN, {}, ("", ""), epoch_loss=EpochLoss(GPU))
    process, saver = SpacedDiffusion(**config.TrainSampler), Saver(tmp_path, training, stop)
    train_diffusion.train_one_epoch(training, process, loaders(config, train_set, test_set)[0], board, saver)
    train_diffusion.validate(training, test_set, CLASSES[:1], board, tmp_path, stop)
    resume(training)


def test_the_classifier_trains_and_validates(gpu, configured, tmp_path):
    config = configured("classifier", "trainer.ema_decay=0.5")
    train_set, test_set = (build_sdas_dataset(config.dataset, split, list(CLASSES), 0) for split in ("train", "test"))
    network, board = create_classifier_unet(**CLASSIFIER, image_size=16).to(GPU), MagicMock()
    training, stop = set_up_training(config, network, RUN, {}, ("", "")), StopRequest(RUN)
    loader, test_loader = loaders(config, train_set, train_classifier.TestImages(test_set))
    process = SpacedDiffusion(**config.TestSampler)
    train_classifier.train_one_epoch(training, process, loader, board, Saver(tmp_path, training, stop))
    assert train_classifier.validate(training, process, test_loader, board, stop) == 1


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m", "dpmpp_2m_sde"])
def test_images_are_drawn_with_guidance(sampler, gpu):
    unet = create_diffusion_unet(**UNET).to(GPU)
    guidance = classifier_guidance(create_classifier_unet(**CLASSIFIER, image_size=16).to(GPU), 1.0)
    process = SpacedDiffusion(1000, "ddim2", "linear", rescale_timesteps=True)
    drawing = Sampler(process, unet, guidance, sampler, "off", (16, 16), 0, GPU)
    assert drawing.draw("dots", 0, range(2), 0.1, 0.2).shape == (2, 16, 16, 3)


def test_images_are_edited(gpu):
    process = SpacedDiffusion(1000, "logsnr3", "linear")
    drawing = Sampler(process, create_diffusion_unet(**UNET).to(GPU), None, "dpmpp_2m_sde", "off", (16, 16), 0, GPU)
    image, mask = np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), np.uint8)
    goods = [GoodImage(image, image[:16, :16], mask, seed) for seed in range(2)]
    edits = edit_images(drawing, 0, goods, [0.1, 0.2], [0.2, 1.0])
    assert [edit.image.shape for edit in edits] == [(20, 20, 3)] * 2


@pytest.mark.parametrize(("name", "fused"), [("Adam", True), ("RAdam", None)])
def test_the_parts_of_a_step(name, fused, gpu, tmp_path):
    gpu.number = 0  # the number of bad steps
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(GPU)
    optimizer = build_optimizer(EasyDict(type=name, kwargs={"lr": 0.1}), model, GPU)
    assert optimizer.defaults.get("fused") is fused
    stepper, ema, epoch_loss, meter = Stepper(model, optimizer, "off", 1.0), EMA(model, 0.9), EpochLoss(GPU), Meter()
    for step in range(2):
        loss = model(torch.ones(2, 3, 4, 4, device=GPU)).square().mean()
        stepper.backward(loss)
        stepper.step()
        ema.update(model, step)
        epoch_loss.add(loss.detach(), 1.0)
        meter.add({"loss": loss.detach()}, 2)
    stepper.check(tmp_path)
    assert set(optimizer.state) == set(model.parameters())
    assert meter.read().means == {"loss": 0}
    assert epoch_loss.mean() == 0


# ---- nothing waits for the GPU in a step -----------------------------------------------------------------------------


def epoch_of(script: str, configured, folder) -> Callable[[], None]:
    """One pass of a training script over a few images, as on a GPU; no step of it is reported."""
    config = configured(script, "dataset.batch_size=4", "trainer.print_freq_step=1000", "trainer.max_bad_steps=1000")
    if script == "realnet":
        train_set = build_realnet_train_set(config.dataset, "dots", 0)
        network = build_realnet(config)
    else:
        train_set = build_sdas_dataset(config.dataset, "train", list(CLASSES), 0)
        diffusion = script == "diffusion"
        network = create_diffusion_unet(**UNET) if diffusion else create_classifier_unet(**CLASSIFIER, image_size=16)
    epoch_loss = EpochLoss(GPU) if script == "diffusion" else None
    training = set_up_training(config, network.to(GPU), RUN, {}, ("", ""), epoch_loss=epoch_loss)
    training.forecast = MagicMock()  # which waits in two steps of a run, to time the steps between
    batches = EpochBatches(len(train_set), 4, RUN, 0)
    loader, board, saver = (
        make_loader(train_set, batches, 0, RUN),
        MagicMock(),
        Saver(folder, training, StopRequest(RUN)),
    )
    if script == "realnet":
        criterion = build_criterion(config.criterion, DETECTOR_LOSSES)
        return lambda: train_realnet.train_one_epoch(training, criterion, loader, board, saver, None)
    process = SpacedDiffusion(**config.TrainSampler)
    module = train_diffusion if script == "diffusion" else train_classifier
    return lambda: module.train_one_epoch(training, process, loader, board, saver)


def sampling(sampler: str) -> Callable[[], torch.Tensor]:
    """A pass of sample.py's loop with guidance."""
    unet = create_diffusion_unet(**UNET).to(GPU)
    guidance = classifier_guidance(create_classifier_unet(**CLASSIFIER, image_size=16).to(GPU), 1.0)
    drawn = Sampler(SpacedDiffusion(1000, "ddim4", "linear"), unet, guidance, sampler, "off", (16, 16), 0, GPU)
    return lambda: drawn.sample(0, torch.tensor([0.1, 0.2]), [torch.Generator().manual_seed(i) for i in range(2)])


@pytest.mark.parametrize("script", ["realnet", "diffusion", "classifier"])
def test_no_training_step_waits_for_the_pretended_gpu(script, gpu, configured, tmp_path):
    epoch = epoch_of(script, configured, tmp_path)
    epoch()  # tables of the process are copied once
    gpu.waits.clear()
    epoch()
    assert gpu.waits == []


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_no_step_of_sampling_waits_for_the_pretended_gpu(sampler, gpu):
    sample = sampling(sampler)
    sample()
    gpu.waits.clear()
    sample()
    assert gpu.waits == []


def test_the_pretended_gpu_knows_what_waits(gpu):
    there = torch.ones(3).to(GPU, non_blocking=True)
    assert gpu.waits == []
    for waiting in (
        lambda: there.sum().item(),
        lambda: there.cpu(),
        lambda: there[there > 0],
        lambda: bool(there.any()),
        lambda: torch.ones(3).to(GPU),
        lambda: torch.tensor([1.0, 2.0], device=GPU),
        lambda: there.copy_(torch.ones(3)),
        lambda: there.nonzero(),
    ):
        before = len(gpu.waits)
        waiting()
        assert len(gpu.waits) > before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", ["realnet", "diffusion", "classifier", "ancestral", "ddim"])
def test_no_step_waits_for_a_gpu(script, configured, tmp_path):
    work = sampling(script) if script in ("ancestral", "ddim") else epoch_of(script, configured, tmp_path)
    work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
