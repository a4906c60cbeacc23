"""Speed of the works that time goes into, each as a ratio to plain float32 in the same run: above 1 is faster.

    python benchmarks/speed.py                           about 15 minutes on one core
    python benchmarks/speed.py --only inference step     works whose names contain one of these words
    python benchmarks/speed.py --threads 4 --rounds 7

The variants of a work take turns, so that a machine that slows down slows all of them. A ratio is the median over the
rounds, with its range. "of matmul" is the work's floating-point rate, as a share of that of a large float32 matrix
product in the same rounds: what is left to gain. Weights are random, images are noise. bf16 is measured if the CPU has
instructions for it, since emulated it is many times slower.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.metrics import image_scores
from models import build_realnet
from models.losses import DETECTOR_LOSSES, build_criterion
from models.realnet import ExportedRealNet
from models.sdas import SpacedDiffusion, create_classifier_unet, create_diffusion_unet
from models.sdas.guidance import classifier_guidance
from utils.config import load_config, model_kwargs
from utils.optim import Stepper
from utils.precision import autocast, cast_weights, resolve_precision

CPU = torch.device("cpu")
BASE = "float32"
MATMUL = 1024  # side of the matrices
LARGE = "WRN-50"
DETECTORS = {LARGE: ("MVTec-AD/realnet.yaml", 2), "quick": ("presets/quick.yaml", 4)}  # settings, batch
SIDE = 256  # of the detectors' images
SMALL_UNET = ["unet.classifier_width=64", "classifier.classifier_width=32"]
SMALL_SIDE, SMALL_BATCH = 64, 4


@dataclass
class Work:
    """One thing to measure.

    Args:
        name: as in the table.
        variants: what to time, by name; the first is what the others are compared with.
        units: images (or the like) of a call.
        flops: floating-point operations of a call of the first, or 0 if they are not what counts.
    """

    name: str
    variants: dict[str, Callable[[], Any]]
    units: int = 1
    flops: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="measure works whose names contain one of the words")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant is timed (5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    return parser.parse_args()


def counted(call: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products and convolutions of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


# ---- detectors -------------------------------------------------------------------------------------------------------


def settings_of(file: str, *overrides: str) -> Any:
    return load_config(ROOT / "experiments" / file, ["net.backbone.kwargs.weights=random", *overrides], "realnet")


def detector_works() -> Iterator[tuple[str, Callable[[], Work]]]:
    for name, (file, batch) in DETECTORS.items():
        yield f"training step, {name}", partial(training_step, name, file, batch)
        yield f"inference, {name}", partial(inference, name, file, batch)
    yield "inference, quick, ONNX", onnx


def network_of(config: Any) -> nn.Module:
    torch.manual_seed(0)
    network = build_realnet(config)
    network.backbone.needs_calibration = False
    return network


def training_step(name: str, file: str, batch: int) -> Work:
    config = settings_of(file)
    images = torch.randn(batch, 3, SIDE, SIDE)
    sample = {
        "image": images,
        "gt_image": images.flip(0),
        "mask": (torch.rand(batch, 1, SIDE, SIDE) < 0.05).float(),
        "changed": torch.arange(batch) % 2 == 0,
    }
    criterion = build_criterion(config.criterion, DETECTOR_LOSSES)

    def stepping(network: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> Callable[[], None]:
        stepper = Stepper(network, optimizer, precision, None)

        def step() -> None:
            with autocast(CPU, precision):
                outputs = network(sample, train=True)
            stepper.backward(sum(loss(outputs) for loss in criterion.values()))
            stepper.step()

        return step

    def adam(network: nn.Module, fused: bool) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-6, fused=fused)

    # The variants share weights and moments where they can, which take 4 GB each for WRN-50.
    network = network_of(config).train()
    fused = adam(network, True)
    variants = {BASE: stepping(network, adam(network, False), "off"), "fused Adam": stepping(network, fused, "off")}
    if name != LARGE:
        other = copy.deepcopy(network).to(memory_format=torch.channels_last)
        variants["channels last, fused"] = stepping(other, adam(other, True), "off")
    for label in native_bf16():
        variants[f"fused Adam, {label}"] = stepping(network, fused, label)
    return Work(f"training step, {name}", variants, batch, counted(variants[BASE]))


def inference(name: str, file: str, batch: int) -> Work:
    images = torch.randn(batch, 3, SIDE, SIDE)

    def inferring(precision: str) -> Callable[[], None]:
        network = network_of(settings_of(file)).eval()
        cast_weights(network, precision)

        @torch.inference_mode()
        def infer() -> None:
            with autocast(CPU, precision):
                network({"image": images})

        return infer

    variants = {BASE: inferring("off")} | {label: inferring(label) for label in native_bf16()}
    return Work(f"inference, {name}", variants, batch, counted(variants[BASE]))


def onnx() -> Work:
    import onnxruntime

    network = network_of(settings_of(DETECTORS["quick"][0])).eval()
    images = torch.randn(1, 3, SIDE, SIDE)
    exported = ExportedRealNet(network, (16, 16)).eval()
    file = Path(tempfile.mkdtemp()) / "model.onnx"
    torch.onnx.export(exported, (images,), file, input_names=["image"], dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    @torch.inference_mode()
    def eager() -> None:
        exported(images)

    variants = {BASE: eager, "ONNX runtime": partial(session.run, None, {"image": images.numpy()})}
    return Work("inference, quick, ONNX", variants, 1, counted(eager))


# ---- diffusion -------------------------------------------------------------------------------------------------------


def diffusion_works() -> Iterator[tuple[str, Callable[[], Work]]]:
    yield "diffusion step", diffusion_step
    yield "guided sampling", guided_sampling


def unet() -> nn.Module:
    torch.manual_seed(0)
    config = load_config(ROOT / "experiments/demo/diffusion.yaml", SMALL_UNET[:1], "diffusion")
    return create_diffusion_unet(**model_kwargs(config.unet))


def diffusion_step() -> Work:
    diffusion = SpacedDiffusion(1000, "1000", "linear")
    images = torch.randn(SMALL_BATCH, 3, SMALL_SIDE, SMALL_SIDE)
    times, noise = torch.full((SMALL_BATCH,), 500), torch.randn_like(images)
    variants = {}
    precisions = {BASE: "off", "channels last": "off"} | dict.fromkeys(native_bf16(), "bf16")
    for variant, precision in precisions.items():
        network, kwargs = unet().train(), {"y": torch.zeros(SMALL_BATCH, dtype=torch.long)}
        layout = torch.channels_last if variant != BASE else torch.contiguous_format
        network, own = network.to(memory_format=layout), images.to(memory_format=layout)

        def step(network: nn.Module = network, own: torch.Tensor = own, precision: str = precision, k: dict = kwargs):
            with autocast(CPU, precision):
                losses = diffusion.training_losses(network, own, times, model_kwargs=k, noise=noise)
            losses["loss"].mean().backward()
            network.zero_grad()

        variants[variant] = step
    return Work("diffusion step", variants, SMALL_BATCH, counted(variants[BASE]))


def guided_sampling() -> Work:
    config = load_config(ROOT / "experiments/demo/classifier.yaml", SMALL_UNET[1:], "classifier")
    noise = torch.randn(SMALL_BATCH, 3, SMALL_SIDE, SMALL_SIDE)
    labels = torch.zeros(SMALL_BATCH, dtype=torch.long)

    def sampling(spacing: str, sampler: str, precision: str) -> Callable[[], None]:
        layout = torch.contiguous_format if precision == "off" else torch.channels_last  # as sample.py
        size = (SMALL_SIDE, SMALL_SIDE)
        networks = [unet(), create_classifier_unet(**model_kwargs(config.classifier), image_size=size)]
        network, classifier = (part.requires_grad_(False).eval().to(memory_format=layout) for part in networks)
        for part in (network, classifier):
            cast_weights(part, precision)
        guidance = classifier_guidance(classifier, 1.0, precision)
        loop = SpacedDiffusion(1000, spacing, "linear").sample_loop(sampler)

        def sample() -> None:
            with autocast(CPU, precision):
                loop(network, noise, s=0.1, cond_fn=guidance, model_kwargs={"y": labels})

        return sample

    base = "20 ancestral steps"
    variants = {base: sampling("ddim20", "ancestral", "off")}
    variants["10 of dpmpp_2m_sde"] = sampling("logsnr10", "dpmpp_2m_sde", "off")
    for label in native_bf16():
        variants[f"{base}, {label}"] = sampling("ddim20", "ancestral", label)
        variants[f"10 of dpmpp_2m_sde, {label}"] = sampling("logsnr10", "dpmpp_2m_sde", label)
    return Work("guided sampling", variants, SMALL_BATCH)  # FlopCounterMode does not follow torch.autograd.grad


# ---- the rest --------------------------------------------------------------------------------------------------------


def other_works() -> Iterator[tuple[str, Callable[[], Work]]]:
    yield "image scores of 60 maps", scores
    yield "train_realnet.py --help", start


def scores() -> Work:
    maps = np.random.default_rng(0).random((60, SIDE, SIDE), np.float32)

    def pooled() -> np.ndarray:
        return F.avg_pool2d(torch.from_numpy(maps)[:, None], 16, stride=1).amax(dim=(1, 2, 3)).numpy()

    variants = {"avg_pool2d": pooled, "running sums": partial(image_scores, maps, (16, 16))}
    return Work("image scores of 60 maps", variants, 60)


def start() -> Work:
    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)

    script = "runpy.run_path('train_realnet.py', run_name='__main__')"
    by_help = f"import runpy, sys; sys.argv = ['train_realnet.py', '--help']; {script}"
    variants = {"imports": partial(run, "import train_realnet"), "--help": partial(run, by_help)}
    return Work("train_realnet.py --help", variants)


def native_bf16() -> list[str]:
    """The variant bf16, if this CPU has instructions for it."""
    return ["bf16"] if resolve_precision("auto", CPU) == "bf16" else []


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(work: Work, rounds: int) -> list[float]:
    """Time the variants in turns into work.seconds; returns the times of the matrix product."""
    a, b = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
    products = []
    for variant in work.variants.values():
        variant()  # Warm up.
    for _ in range(rounds):
        products.append(timed(lambda: a @ b))
        for name, variant in work.variants.items():
            work.seconds.setdefault(name, []).append(timed(variant))
    return products


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def rows(work: Work, products: list[float]) -> Iterator[str]:
    base, *_ = work.seconds
    rate = 2 * MATMUL**3 / statistics.median(products)
    for name, seconds in work.seconds.items():
        ratios = [b / s for b, s in zip(work.seconds[base], seconds, strict=True)]
        median = statistics.median(seconds)
        share = f"{work.flops / median / rate:.0%}" if work.flops and name == base else ""
        spread = "" if name == base else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        yield f"| {work.name} | {name} | {1e3 * median / work.units:.1f} | {spread} | {share} |"


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    works = dict([*detector_works(), *diffusion_works(), *other_works()])
    chosen = {name: make for name, make in works.items() if not args.only or any(word in name for word in args.only)}
    if not chosen:
        sys.exit(f"error: --only {' '.join(args.only)}: no such work; there are: {'; '.join(works)}")
    how = f"{args.threads} thread(s), {args.rounds} rounds"
    print(f"torch {torch.__version__}, {how}, bf16 {'' if native_bf16() else 'not '}measured\n")
    print("| work | variant | ms per image or call | times as fast | of matmul |\n|---|---|---:|---:|---:|")
    for make in chosen.values():
        work = make()
        for row in rows(work, measure(work, args.rounds)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
