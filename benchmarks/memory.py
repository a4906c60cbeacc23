"""Estimates the GPU memory of training, sampling and prediction, without a GPU.

    python benchmarks/memory.py
    python benchmarks/memory.py --check

Runs steps on fake tensors, which have shapes but no values, and counts the bytes of those that are alive: weights,
gradients, moments, averages, activations and the results of single operations. Not counted: what a kernel takes for
itself (cuDNN's workspaces), gaps between blocks, and the CUDA context, together about 1 GiB or a tenth.
--check compares the estimate with the resident memory of a real step on the CPU.
"""

import argparse
import gc
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.steps import Subject, predict, sample, sampler_of, settings_of
from utils.distributed import Run, peak_memory

ALONE = Run(0, 1, torch.device("cpu"))
BATCHES = (1, 4, 16)
GIB = 2**30
MVTEC = ROOT / "experiments/MVTec-AD"
DETECTORS = {
    "WRN-50, 256x256 (MVTec-AD/realnet.yaml)": MVTEC / "realnet.yaml",
    "preset standard": ROOT / "experiments/presets/standard.yaml",
    "preset quick": ROOT / "experiments/presets/quick.yaml",
}
SDAS = {
    "diffusion": ("diffusion, 553 M (MVTec-AD/diffusion.yaml)", "unet"),
    "classifier": ("classifier (MVTec-AD/classifier.yaml)", "classifier"),
}
# What --check runs: (script, settings file, images, overrides); small, but most of their memory is in tensors.
SMALL_UNET = ["classifier_width=64", "channel_mult=[1,2,2]", "attention_resolutions=[4]", "num_head_channels=32"]
CHECKED = (
    "diffusion",
    MVTEC / "diffusion.yaml",
    8,
    ["dataset.input_size=[64,64]", *(f"unet.{setting}" for setting in SMALL_UNET)],
)


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operations create, until nothing refers to them.

    Attributes:
        live: bytes now. peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:  # a view, or the result of an operation in place
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peaks_of(begin: Callable[[], Callable[[int], Any]], batches: Sequence[int] = BATCHES) -> list[int]:
    """Peaks in bytes with fake tensors.

    Args:
        begin: makes networks; what it returns is called with each number of images, in ascending order.
    """
    peaks = []
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as memory:
        work = begin()
        # What building leaves in cycles would count until Python happens to collect it.
        gc.collect()
        memory.peak = memory.live  # checks of the network may take more than it keeps
        for images in batches:
            work(images)
            peaks.append(memory.peak)
    return peaks


def training(subject: Subject) -> Callable[[int], None]:
    """Makes two steps with a number of images: the optimiser's state is there from the second one on."""
    run = subject.training(subject.build(), ALONE)

    def work(images: int) -> None:
        step = subject.step(run, subject.batch(images, ALONE.device))
        for _ in range(2 if run.progress.step == 0 else 1):
            step()

    return work


def prediction(subject: Subject) -> Callable[[int], torch.Tensor]:
    network = subject.build().eval()
    return lambda images: predict(network, torch.zeros(images, 3, *subject.size))


def sampling(diffusion: Subject, classifier: Subject, precision: str) -> Callable[[int], torch.Tensor]:
    """Samples in two steps; further ones need no more memory."""
    sampler = sampler_of(diffusion.build(), classifier.build(), diffusion.size, precision, 2)
    return lambda images: sample(sampler, images)


def rows() -> Iterator[tuple[str, str, str, Callable[[], list[int]]]]:
    """What is done, precision, activation checkpointing, and a call that gives the peak in bytes at each of BATCHES."""
    for name, path in DETECTORS.items():
        for amp in ("off", "bf16"):
            subject = settings_of("detector", path, f"trainer.amp='{amp}'")
            yield f"train detector: {name}", amp, "", partial(peaks_of, partial(training, subject))
        yield f"predict: {name}", "off", "", partial(peaks_of, partial(prediction, subject))
    for script, (name, section) in SDAS.items():
        for amp in ("off", "bf16"):
            for checkpointing in (False, True):
                subject = settings_of(
                    script,
                    MVTEC / f"{script}.yaml",
                    f"trainer.amp='{amp}'",
                    f"{section}.use_checkpoint={checkpointing}",
                )
                yield (
                    f"train {name}",
                    amp,
                    "yes" if checkpointing else "no",
                    partial(peaks_of, partial(training, subject)),
                )
    both = [settings_of(script, MVTEC / f"{script}.yaml") for script in SDAS]
    for amp in ("off", "bf16"):
        yield "sample: both networks of MVTec-AD", amp, "", partial(peaks_of, partial(sampling, *both, amp))


def print_table(word: str) -> None:
    print("Peak memory in GiB, estimated\n")
    print(f"| what | amp | use_checkpoint | {' | '.join(f'batch {images}' for images in BATCHES)} |")
    print(f"|---|---|---|{'---:|' * len(BATCHES)}")
    for what, amp, checkpointing, peaks in rows():
        if word in what:
            cells = " | ".join(f"{peak / GIB:.1f}" for peak in peaks())
            print(f"| {what} | {amp} | {checkpointing} | {cells} |", flush=True)


def checked() -> tuple[Subject, int]:
    script, path, images, overrides = CHECKED
    return settings_of(script, path, *overrides), images


def _grow(connection: Any) -> None:
    """In a process of its own: how much the largest resident memory grows by building a network and two steps."""
    torch.set_num_threads(1)
    subject, images = checked()
    torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(3, 3, 3, 3))  # oneDNN has memory of its own
    before = peak_memory(ALONE.device)
    training(subject)(images)
    connection.send(peak_memory(ALONE.device) - before)


def measured_growth() -> int:
    """Bytes by which a real step on the CPU makes a process grow."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc returns what is freed, and keeps no gaps
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_grow, args=(sender,))
    process.start()
    grown = receiver.recv()
    process.join()
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with a real step on the CPU instead")
    parser.add_argument("--only", default="", metavar="WORD", help="rows that name this")
    args = parser.parse_args()
    logging.disable()
    warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor")  # of deep copies
    if not args.check:
        print_table(args.only)
        return
    subject, images = checked()
    [estimate], measured = peaks_of(partial(training, subject), [images]), measured_growth()
    print(f"estimated {estimate / GIB:.3f} GiB, measured {measured / GIB:.3f} GiB: {estimate / measured - 1:+.1%}")


if __name__ == "__main__":
    main()
