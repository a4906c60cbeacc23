"""Draw anomalous images with SDAS.

    python sample.py --dataset MVTec-AD
    python sample.py --dataset MVTec-AD --class_name bottle --strength 0.1 0.2 --sampler ancestral --steps 20
    python sample.py --dataset MVTec-AD --sampler dpmpp_2m_sde --steps 10
    python sample.py --dataset MVTec-AD --no-classifier --preview
    torchrun --nproc_per_node=4 sample.py --dataset MVTec-AD

Settings: experiments/<dataset>/sample.yaml. Writes <workspace.root>/<class>/rank<r>_<i>.jpg. Image i depends on the
seed, the class and i, but not on the number of ranks. Existing images are not drawn again.
--preview only writes a strip per class over s = 0 .. 0.3, to help choose the strength.
"""

import argparse

from utils import arguments
from utils.settings import SETTINGS


def parse_args() -> argparse.Namespace:
    parser = arguments.run_parser(__doc__)
    parser.add_argument("--class_name", default="all", help="one class, several separated by commas, or all")
    parser.add_argument("--strength", nargs=2, type=float, metavar=("LOW", "HIGH"), help="range of the strength s")
    parser.add_argument(
        "--sampler",
        choices=SETTINGS["sample"].keys["sampler"].choices,
        help="use s of 0.01 .. 0.03 with ddim, and of 0 with dpmpp_2m",
    )
    parser.add_argument(
        "--steps", type=int, help="sampling steps: TestSampler.section_counts ddimN, or logsnrN with the dpmpp samplers"
    )
    parser.add_argument("--no-classifier", action="store_true", help="sample without guidance")
    parser.add_argument("--seed", type=int, help="seed, instead of random_seed")
    parser.add_argument("--preview", action="store_true", help="only write a strip over s per class")
    parser.add_argument("--overwrite", action="store_true", help="delete existing images and draw them again")
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict

from datasets.catalog import find
from datasets.loaders import SharedBatches
from models.sdas import SpacedDiffusion, check_size, create_classifier_unet, create_diffusion_unet
from models.sdas.guidance import classifier_guidance
from models.sdas.trained import class_names_of, load_averaged, load_networks
from utils import cli, distributed
from utils.config import collect_errors, load_config, model_kwargs
from utils.device import to_device, use_fast_kernels
from utils.distributed import Run
from utils.errors import RunError, Stopped, UsageError
from utils.files import remove_parts
from utils.lock import folder_lock
from utils.log import log, progress_bar, set_up_logging
from utils.names import name_problem
from utils.pictures import contact_sheet, to_uint8, write_image
from utils.precision import autocast, resolve_precision
from utils.run_record import identity_of, record_run
from utils.signals import StopRequest, signal_name, stop_requests

PREVIEW_STRENGTHS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
PREVIEW_ROWS = 2
IMAGE_NAME = re.compile(r"rank\d+_(\d+)\.jpg")


@dataclass
class Sampler:
    """Draws images of a class, each from its own random numbers."""

    process: SpacedDiffusion
    unet: torch.nn.Module
    cond_fn: Callable | None
    sampler: str  # see SpacedDiffusion.sample_loop
    precision: str
    size: tuple[int, int]
    seed: int
    device: torch.device

    def model(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            return self.unet(x, t, y)

    def draw(
        self,
        name: str,
        number: int,
        indices: Sequence[int],
        low: float | torch.Tensor,
        high: float | torch.Tensor,
        progress: bool = False,
    ) -> np.ndarray:
        """Draw the images (N,H,W,3) uint8 with these indices, each with its own strength from [low, high]."""
        # One generator per image, so that its noise does not depend on the batch.
        generators = [torch.Generator().manual_seed(image_seed(self.seed, name, i)) for i in indices]
        strengths = low + (high - low) * torch.stack([torch.rand((), generator=g) for g in generators])
        images = self.sample(number, strengths, generators, progress)
        if not images.isfinite().all():
            raise RunError(f"{name}: the model draws values that are not finite; it has diverged, or needs amp: off")
        return to_uint8(images.clamp(-1, 1).cpu().numpy(), (0.5,) * 3, (0.5,) * 3)

    def sample(
        self, number: int, strengths: torch.Tensor, generators: Sequence[torch.Generator], progress: bool = False
    ) -> torch.Tensor:
        """Images (N,3,H,W) of a class, on the device, about -1 .. 1, with strengths (N,). No step waits for it."""
        noise = torch.stack([torch.randn(3, *self.size, generator=g) for g in generators])
        y = torch.full((len(generators),), number, device=self.device)
        return self.process.sample_loop(self.sampler)(
            self.model,
            to_device(noise, self.device),
            s=to_device(strengths, self.device),
            cond_fn=self.cond_fn,
            model_kwargs={"y": y},
            generator=generators,
            progress=progress,
        )


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "sample")
    config = load_config(path, args.set, "sample")
    apply_arguments(config, args, path)
    collect_errors(path, [("TestSampler", lambda: SpacedDiffusion(**config.TestSampler))])
    out = cli.experiment_dir(args)
    with distributed.session(args.device, identity_of(config)) as run, stop_requests(run) as stop:
        board = set_up_logging(run, out / config.saver.log_dir, "sample", config.saver.keep_pictures)
        # Without cudnn_benchmark: a continued run, and every rank, has to take the same kernels.
        use_fast_kernels(run.device, config.tf32)
        record_run(run, out / config.saver.log_dir, "sample", config)
        networks = load_networks(config)
        check_networks(config, path)
        classes = class_list(config, networks, args.dataset)
        chosen = choose_classes(args.class_name, classes)
        sampler = set_up_sampler(config, run, networks)
        for name in chosen:
            number = classes.index(name)
            if args.preview:
                if run.is_main:
                    path = out / config.saver.vis_dir / f"{name}.png"
                    strip = preview(sampler, name, number)
                    write_image(path, strip)
                    board.add_image(f"sdas/{name}", strip, 0)
                    log.info("%s: strengths %g .. %g in %s", name, PREVIEW_STRENGTHS[0], PREVIEW_STRENGTHS[-1], path)
            else:
                folder = Path(config.workspace.root) / name
                with folder_lock(folder, run):
                    draw_class(sampler, run, config, folder, number, args.overwrite, stop)
        board.close()


def apply_arguments(config: EasyDict, args: argparse.Namespace, path: Path) -> None:
    """Apply the command line to the settings of the file at `path`, and check what depends on both."""
    if args.strength:
        config.strength = list(args.strength)
    if args.sampler:
        config.sampler = args.sampler
    if args.steps is not None:
        if args.steps < 1:
            raise UsageError(f"--steps {args.steps}: at least 1")
        spacing = "logsnr" if config.sampler.startswith("dpmpp") else "ddim"
        config.TestSampler.section_counts = f"{spacing}{args.steps}"
    if args.seed is not None:
        config.random_seed = args.seed
    if args.no_classifier:
        config.classifier = None
    if len(config.strength) != 2 or not 0 <= config.strength[0] <= config.strength[1]:
        where = "--strength" if args.strength else f"{path}: strength"
        raise UsageError(f"{where}: {config.strength} is not a range [low, high] with 0 <= low <= high")
    if config.sampler == "dpmpp_2m":
        if args.preview:
            raise UsageError("--preview draws a strip over s, but sampler dpmpp_2m adds no noise; use dpmpp_2m_sde")
        if config.strength[1] > 0:
            where = "--strength" if args.strength else f"{path}: strength"
            text = "has no effect with sampler dpmpp_2m, which adds no noise; use 0 0, or sampler dpmpp_2m_sde"
            raise UsageError(f"{where}: {config.strength} {text}")


def check_networks(config: EasyDict, path: Path) -> None:
    """Check the networks' settings, which the checkpoints may have brought, before anything is drawn."""
    size = (config.dataset.H, config.dataset.W)

    def networks() -> None:
        with torch.device("meta"):
            create_diffusion_unet(**model_kwargs(config.unet))
            if config.classifier is not None:
                create_classifier_unet(**model_kwargs(config.classifier), image_size=size)

    collect_errors(
        path,
        [
            ("dataset", lambda: check_size(size, config.unet.channel_mult, "dataset.H, dataset.W")),
            ("unet, classifier", networks),
            ("TestSampler", lambda: SpacedDiffusion(**config.TestSampler)),
        ],
    )


def class_list(config: EasyDict, networks: dict[str, tuple[Path, dict]], dataset: str | None) -> list[str]:
    """The classes in the order of their numbers: from the checkpoint, the settings, or the known data sets.

    Raises:
        UsageError: the classes are unknown, a name cannot be that of a folder, or the classifier was trained on other
            classes and would guide wrongly.
    """
    path, content = networks["unet"]
    classes = class_names_of(content) or [str(name) for name in config.classes or []]
    for name in classes:
        problem = name_problem(name) or ("is there twice" if classes.count(name) > 1 else None)
        if problem:
            raise UsageError(f"{path}: the class {name[:80]!r} {problem}; it cannot be the name of a folder")
    if "classifier" in networks:
        check_same_classes(config, networks, classes)
    if classes:
        return classes
    info = find(dataset or "")
    if info is None or len(info.classes) != config.unet.class_number:
        raise UsageError(f"{path} does not name its classes; list them in their order under `classes` in sample.yaml")
    return list(info.classes)


def check_same_classes(config: EasyDict, networks: dict[str, tuple[Path, dict]], classes: list[str]) -> None:
    """Refuse a classifier whose class numbers mean other classes than those of the diffusion model."""
    (path, _), (classifier_path, content) = networks["unet"], networks["classifier"]
    hint = "train both on the same image list, or pass --no-classifier"
    others = class_names_of(content)
    if classes and not others:
        log.warning("warning: %s does not name its classes; they have to be %s", classifier_path, ", ".join(classes))
    if classes and others and others != classes:
        lists = f"the classes {', '.join(others)}, and {path} on {', '.join(classes)}"
        raise UsageError(f"{classifier_path} was trained on {lists}; {hint}")
    numbers = config.classifier.class_number, config.unet.class_number
    if numbers[0] != numbers[1]:
        raise UsageError(f"{classifier_path} knows {numbers[0]} classes, and {path} {numbers[1]}; {hint}")


def choose_classes(wanted: str, classes: list[str]) -> list[str]:
    if wanted == "all":
        return classes
    chosen = [name.strip() for name in wanted.split(",")]
    for name in chosen:
        if name not in classes:
            raise UsageError(f"--class_name {name}: the classes of the model are {', '.join(classes)}")
    return chosen


def set_up_sampler(config: EasyDict, run: Run, networks: dict[str, tuple[Path, dict]]) -> Sampler:
    """Load the weights and set up the diffusion process."""
    size = (config.dataset.H, config.dataset.W)
    unet = create_diffusion_unet(**model_kwargs(config.unet))
    load_averaged(unet, *networks["unet"], "the unet section of sample.yaml")
    precision, cond_fn = resolve_precision(config.amp, run.device), None
    # Convolutions in bf16 and fp16 are made for channels-last weights; float32 is not faster with them on a CPU.
    layout = torch.contiguous_format if precision == "off" else torch.channels_last
    unet.requires_grad_(False).eval().to(run.device, memory_format=layout)
    if "classifier" in networks:
        classifier = create_classifier_unet(**model_kwargs(config.classifier), image_size=size)
        load_averaged(classifier, *networks["classifier"], "the classifier section of sample.yaml")
        log.info("guidance scale %g", config.classifier_scale)
        classifier.requires_grad_(False).eval().to(run.device, memory_format=layout)
        cond_fn = classifier_guidance(classifier, config.classifier_scale, precision)
    process = SpacedDiffusion(**config.TestSampler)
    return Sampler(process, unet, cond_fn, config.sampler, precision, size, config.random_seed, run.device)


def image_seed(seed: int, name: str, index: int) -> int:
    """The seed of one image's random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()[:8], "big") >> 1


def draw_class(
    sampler: Sampler,
    run: Run,
    config: EasyDict,
    folder: Path,
    number: int,
    overwrite: bool,
    stop: StopRequest,
) -> None:
    """Draw the missing ones of a class's images 0 .. sample_number - 1; ranks share the batches.

    Raises:
        Stopped: a signal stopped the run after a batch; the same command continues from there.
    """
    low, high = config.strength
    batches = SharedBatches(config.sample_number, config.dataset.batch_size, run)
    if overwrite:
        # A model that has diverged fails here, before anything is deleted.
        sampler.draw(folder.name, number, next(iter(batches), [0])[:1], low, high)
        distributed.barrier()
    if run.is_main:
        remove_parts(folder)
        for path in folder.glob("rank*_*.jpg") if overwrite else ():
            path.unlink()
    distributed.barrier()
    existing = {int(match[1]) for path in folder.glob("rank*_*.jpg") if (match := IMAGE_NAME.fullmatch(path.name))}
    # No rank may write before every rank has listed the folder.
    distributed.barrier()
    for indices in progress_bar(batches, run, folder.name):
        missing = [i for i in indices if i not in existing]
        if not missing:
            continue
        # Draw the whole batch even if few images are missing, so that a continued run gives bit-identical images.
        images = sampler.draw(folder.name, number, indices, low, high)
        for i, image in zip(indices, images, strict=True):
            if i not in existing:
                write_image(folder / f"rank{run.rank}_{i}.jpg", image)
        if stop.signal:
            log.info("%s: stopped; the same command without --overwrite goes on", signal_name(stop.signal))
            raise Stopped(stop.signal)
    distributed.barrier()
    kept = len(existing & set(range(config.sample_number)))
    log.info(
        "%s: %d images in %s, %d of them existed already%s",
        folder.name,
        config.sample_number,
        folder,
        kept,
        " (--overwrite draws them again)" if kept else "",
    )


def preview(sampler: Sampler, name: str, number: int) -> np.ndarray:
    """A strip of images: one column per strength; all images in a row have the same random numbers."""
    count = len(PREVIEW_STRENGTHS)
    strengths = torch.tensor(PREVIEW_STRENGTHS).repeat(PREVIEW_ROWS)
    indices = [row for row in range(PREVIEW_ROWS) for _ in range(count)]
    images = sampler.draw(name, number, indices, strengths, strengths, progress=True)
    rows = [("", list(images[row * count : (row + 1) * count])) for row in range(PREVIEW_ROWS)]
    return contact_sheet(rows, [f"s={s:g}" for s in PREVIEW_STRENGTHS])


if __name__ == "__main__":
    cli.run(main)
