"""Checks and times every script's step on a GPU, in each precision, compiled and not, in both memory layouts.

    python benchmarks/gpu.py                              all of it on one GPU, and then on two if there are two
    python benchmarks/gpu.py --minutes 20 --batch 8
    python benchmarks/gpu.py --device cpu --quick         small networks; shows that the script works

Prints a Markdown table. Each line is one configuration: its loss compared with the CPU's in float32 (same weights,
images, timesteps and noise), whether all ranks hold the same weights after the steps, images per second of all ranks,
peak memory, and the share of the card's matrix product rate in that precision. Configurations that there is no time
for are left out, and named. Ends with 1 if a loss is off or ranks differ.
"""

import argparse
import copy
import gc
import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.steps import FILES, TRAININGS, Subject, predict, sample, sampler_of, settings_of
from utils import distributed
from utils.device import use_exact_kernels, use_fast_kernels
from utils.distributed import Run, peak_memory

MVTEC = ROOT / "experiments/MVTec-AD"
PRECISIONS = ("off", "bf16", "fp16")
# Of the loss, relative to the CPU's in float32. "off" rounds factors to 10 bits of mantissa (TensorFloat-32).
TOLERANCE = {"off": 0.01, "bf16": 0.05, "fp16": 0.02}
SAMPLING_STEPS = 4
_SMALL = ["classifier_width=32", "classifier_depth=1", "channel_mult=[1,2]", "class_number=2", "num_head_channels=32"]
QUICK = {
    "detector": [
        "dataset.input_size=[64,64]", "net.backbone.kwargs.backbone=resnet18",
        "structure=[{name: block1, layers: [{idx: layer1, planes: 64}], stride: 4}]",
        "net.recon.kwargs={num_res_blocks: 1, channel_mult: [1, 2], attention_mult: [2]}",
        "net.rrs.kwargs={mode_numbers: [8, 8], num_residual_layers: 1}",
    ],
    "diffusion": ["dataset.input_size=[16,16]", *(f"unet.{x}" for x in [*_SMALL, "attention_resolutions=[2]"])],
    "classifier": [
        "dataset.input_size=[16,16]",
        *(f"classifier.{x}" for x in [*_SMALL, "classifier_attention_resolutions=[2]"]),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    work: str  # a training, "sampling" or "prediction"
    precision: str
    compiled: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        options = [self.precision, *["compile"] * self.compiled, *["channels_last"] * self.channels_last]
        return f"{self.work}: {', '.join(options)}"


@dataclass
class Bench:
    """What the configurations have in common.

    Args:
        seconds: how long one is timed.
        rates: the card's matrix product rate by precision, in operations per second.
        networks, losses, flops: by training, made or measured once.
    """

    run: Run
    batch: int
    quick: bool
    seconds: float
    rates: dict[str, float] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)

    def subject(self, script: str, *overrides: str) -> Subject:
        extra = QUICK[script] if self.quick else []
        return settings_of(script, MVTEC / f"{FILES[script]}.yaml", *extra, *overrides, batch=self.batch)

    def network(self, script: str) -> nn.Module:
        """A copy, on the device, of the script's network; nothing in it is zero, so that every layer matters."""
        if script not in self.networks:
            torch.manual_seed(0)
            network = self.subject(script).build()
            with torch.no_grad():
                for parameter in network.parameters():
                    if not parameter.any():
                        parameter.normal_(0, 0.02)
            self.networks[script] = network
        return copy.deepcopy(self.networks[script]).to(self.run.device)

    def loss_on_cpu(self, script: str) -> float:
        """In float32 and training mode."""
        if script not in self.losses:
            subject, cpu = self.subject(script), torch.device("cpu")
            network = copy.deepcopy(self.network(script)).to(cpu).train()
            with torch.no_grad():
                self.losses[script] = subject.loss(network, subject.batch(self.batch, cpu), "off")
        return self.losses[script]


def variants(compiles: tuple[bool, ...]) -> Iterator[Variant]:
    """All configurations, quick ones first: compilation takes minutes."""
    for compiled in compiles:
        for channels_last in (False, True):
            for precision in PRECISIONS:
                for script in TRAININGS:
                    yield Variant(script, precision, compiled, channels_last)
        if not compiled:
            yield from (Variant("sampling", precision) for precision in PRECISIONS)
            yield Variant("prediction", "off")  # predict.py knows no other


def measure(bench: Bench, variant: Variant) -> tuple[str, bool]:
    """The table's line, and whether the loss and the ranks' weights are right."""
    run, off, network = bench.run, "", None
    if variant.work in TRAININGS:
        step, network, error = training_step(bench, variant)
        images, off = bench.batch * run.world_size, f"{error:.1e}"
    else:
        step, images, error = inference(bench, variant), bench.batch * run.world_size, 0.0
    step()  # compiles, chooses kernels
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    step()
    seconds = timed(step, bench)
    equal = network is None or same_on_all_ranks(network)
    operations = flops_of(bench, variant, step)
    share = operations / seconds / bench.rates[variant.precision] if operations else 0.0
    right = error <= TOLERANCE[variant.precision] and equal
    cells = [
        variant.name,
        off,
        "" if run.world_size == 1 or network is None else ("equal" if equal else "DIFFER"),
        f"{images / seconds:.1f}",
        f"{peak_memory(run.device) / 2**30:.2f}",
        f"{share:.0%}" if operations else "",
        "" if right else "WRONG",
    ]
    return f"| {' | '.join(cells)} |", right


def measured(bench: Bench, variant: Variant) -> tuple[str, bool]:
    """The same, for a GPU that may be too small; nothing of the configuration stays in memory."""
    try:
        return measure(bench, variant)
    except torch.OutOfMemoryError:
        if bench.run.world_size > 1:  # the other ranks would wait
            raise
        return f"| {variant.name} | out of memory{' |' * 6}", True
    finally:
        torch.compiler.reset()
        gc.collect()
        if bench.run.device.type == "cuda":
            torch.cuda.empty_cache()


def training_step(bench: Bench, variant: Variant) -> tuple[Callable[[], None], nn.Module, float]:
    """A training's step, its network, and how far its first loss is off the CPU's, relatively."""
    run, script = bench.run, variant.work
    use_fast_kernels(run.device, tf32=True, cudnn_benchmark=True)
    subject = bench.subject(
        script,
        f"trainer.amp='{variant.precision}'",
        f"trainer.compile={variant.compiled}",
        f"trainer.channels_last={variant.channels_last}",
    )
    network, expected = bench.network(script).train(), bench.loss_on_cpu(script)
    training, batch = subject.training(network, run), subject.batch(bench.batch, run.device)
    # All ranks have the same images, so that BatchNorm's statistics over ranks are those of one.
    error = abs(subject.loss(training.network, batch, variant.precision) - expected) / abs(expected)
    return subject.step(training, batch), training.network, error


def inference(bench: Bench, variant: Variant) -> Callable[[], torch.Tensor]:
    """A pass of predict.py, or of sample.py with SAMPLING_STEPS steps."""
    run = bench.run
    if variant.work == "prediction":
        use_exact_kernels(run.device)
        network, images = bench.network("detector").eval(), bench.subject("detector").batch(bench.batch, run.device)
        return lambda: predict(network, images["image"])
    use_fast_kernels(run.device, tf32=True)
    networks = (bench.network(script) for script in ("diffusion", "classifier"))
    sampler = sampler_of(*networks, bench.subject("diffusion").size, variant.precision, SAMPLING_STEPS)
    return lambda: sample(sampler, bench.batch)


def timed(step: Callable[[], object], bench: Bench) -> float:
    """Seconds of a step, the mean of several; the same number of them on all ranks, as they exchange gradients."""
    begin = time.perf_counter()
    step()
    wait(bench.run.device)
    once = time.perf_counter() - begin
    count = int(distributed.broadcast(max(1, round(bench.seconds / max(once, 1e-6)))))
    begin = time.perf_counter()
    for _ in range(count):
        step()
    wait(bench.run.device)
    return (time.perf_counter() - begin) / count


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_of(bench: Bench, variant: Variant, step: Callable[[], object]) -> int:
    """Operations of a step: convolutions, matrix products and attention; 0 if not counted.

    Counted in steps that are not compiled; torch's counter cannot follow the gradients of guidance in sampling.
    """
    if variant.work not in bench.flops:
        if variant.compiled or variant.work == "sampling":
            return 0
        with FlopCounterMode(display=False) as counter:
            step()
        bench.flops[variant.work] = counter.get_total_flops()
    return bench.flops[variant.work]


def matmul_rate(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product in a precision."""
    side, dtype = (8192 if device.type == "cuda" else 256), {"bf16": torch.bfloat16, "fp16": torch.float16}
    use_fast_kernels(device, tf32=True)
    factors = [torch.randn(side, side, device=device).to(dtype.get(precision, torch.float32)) for _ in range(2)]
    repeats = 20 if device.type == "cuda" else 2
    torch.matmul(*factors)
    wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        torch.matmul(*factors)
    wait(device)
    return repeats * 2 * side**3 / (time.perf_counter() - begin)


def same_on_all_ranks(network: nn.Module) -> bool:
    """Whether the weights are the same, bit for bit; all ranks have to call this together."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    digests = distributed.gather(digest.hexdigest())
    return distributed.broadcast(digests is None or len(set(digests)) == 1)


def run_all(args: argparse.Namespace) -> bool:
    """Print the table for the ranks that this process belongs to; whether all is right."""
    end = time.monotonic() + 60 * args.minutes
    with distributed.session(args.device) as run:
        use_mixed = PRECISIONS if run.device.type == "cuda" else ("off", "bf16")
        bench = Bench(run, 2 if args.quick else args.batch, args.quick, 0.05 if args.quick else 3.0)
        bench.rates = {precision: matmul_rate(run.device, precision) for precision in use_mixed}
        if run.is_main:
            describe(run, bench)
        right, left_out = True, []
        for variant in variants((False, True) if args.compile else (False,)):
            if variant.precision not in use_mixed:
                continue
            # Ranks have to agree, as they measure together.
            if distributed.broadcast(time.monotonic() > end):
                left_out.append(variant.name)
                continue
            line, good = measured(bench, variant)
            right = right and good
            if run.is_main:
                print(line, flush=True)
        if left_out and run.is_main:
            print(f"\nleft out after {args.minutes:g} minutes: {'; '.join(left_out)}")
        return bool(distributed.broadcast(right))


def describe(run: Run, bench: Bench) -> None:
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    rates = ", ".join(f"{precision} {rate / 1e12:.2f}" for precision, rate in bench.rates.items())
    print(f"\n{name} x {run.world_size}, torch {torch.__version__}, batch {bench.batch} per rank")
    print(f"Matrix products in 10^12 operations per second: {rates}\n")
    print("| step | loss off by | ranks | images/s | peak GiB | of matmul rate | |\n|---|---|---|---:|---:|---:|---|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--minutes", type=float, default=5, help="for each number of GPUs (5)")
    parser.add_argument("--batch", type=int, default=4, help="images per GPU and step (4)")
    parser.add_argument("--quick", action="store_true", help="small networks, two images, a moment each")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave compiled steps out")
    args = parser.parse_args()
    logging.disable()
    right = run_all(args)
    launched = "WORLD_SIZE" in os.environ
    if not launched and args.device != "cpu" and torch.cuda.device_count() > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        right = subprocess.run([*launcher, __file__, *sys.argv[1:]], check=False).returncode == 0 and right
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
