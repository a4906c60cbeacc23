"""Draw anomalous images with SDAS.

    python sample.py --dataset MVTec-AD
    python sample.py --dataset MVTec-AD --class_name bottle --strength 0.1 0.2 --sampler ancestral --steps 20
    python sample.py --dataset MVTec-AD --sampler dpmpp_2m_sde --steps 10
    python sample.py --dataset MVTec-AD --no-classifier --preview
    python sample.py --dataset MVTec-AD --quality
    python sample.py --dataset MVTec-AD --save-steps
    python sample.py --dataset MVTec-AD --class_name bottle --reconstruct photo.png
    torchrun --nproc_per_node=4 sample.py --dataset MVTec-AD

Settings: experiments/<dataset>/sample.yaml. Writes <workspace.root>/<class>/rank<r>_<i>.jpg, and strengths.csv with the
strength of each image. Image i depends on the seed, the class and i, but not on the number of ranks. Existing images
are not drawn again.
--preview only writes a strip per class over s = 0 .. 0.3, to help choose the strength. --quality only measures how
close drawn images are to the training images, over the same strengths (docs/synthesis.md). --save-steps only writes a
sheet per class of what every step leaves of a few images, and of the x_0 that it predicts. --reconstruct only writes a
sheet of given images of a class, inverted to noise and sampled back by DDIM. All of them go to saver.vis_dir.
"""

import argparse

from utils import arguments
from utils.counts import counted
from utils.settings import SETTINGS

QUALITY_IMAGES = 64


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
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--preview", action="store_true", help="only write a strip over s per class")
    only.add_argument("--quality", action="store_true", help="only measure how close images are to real ones, over s")
    only.add_argument("--save-steps", action="store_true", help="only write a sheet of the steps per class")
    only.add_argument("--reconstruct", nargs="+", metavar="IMAGE", help="only reconstruct these images of a class")
    number_help = f"with --quality: images of each strength ({QUALITY_IMAGES})"
    parser.add_argument("--quality-images", type=int, metavar="N", help=number_help)
    parser.add_argument("--overwrite", action="store_true", help="delete existing images and draw them again")
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict

from datasets.build import good_images_of_sdas, sdas_reading
from datasets.catalog import known_classes
from datasets.images import Preprocessing
from datasets.loaders import SharedBatches
from datasets.sdas_folders import SDASFolder
from evaluation.quality import set_up_quality
from models.sdas import SpacedDiffusion
from models.sdas.sampler import Beginning, Sampler, open_networks, set_up_sampler
from models.sdas.sheets import reconstruction_sheet, reconstructions, step_sheet
from utils import cli, distributed
from utils.config import collect_errors, load_config
from utils.device import use_fast_kernels
from utils.distributed import Run
from utils.errors import Stopped, UsageError
from utils.job_progress import JobProgress
from utils.lock import folder_lock
from utils.log import Board, log, set_up_logging
from utils.pictures import contact_sheet, write_image
from utils.run_record import identity_of, log_run, write_record
from utils.signals import StopRequest, signal_name, stop_requests

PREVIEW_STRENGTHS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
PREVIEW_ROWS = 2
MOST_RECONSTRUCTIONS = 64  # rows of a sheet
OWN_STRENGTHS = "goes through strengths of its own"
WITHOUT_STRENGTH = {"preview": OWN_STRENGTHS, "quality": OWN_STRENGTHS, "reconstruct": "adds no noise"}


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "sample")
    config = load_config(path, args.set, "sample")
    apply_arguments(config, args, path)
    check_options(args)
    collect_errors(path, [("TestSampler", lambda: SpacedDiffusion(**config.TestSampler))])
    out = cli.experiment_dir(args)
    with distributed.session(args.device, identity_of(config)) as run, stop_requests(run) as stop:
        board = set_up_logging(run, out / config.saver.log_dir, "sample", config.saver.keep_pictures)
        # Without cudnn_benchmark: a continued run, and every rank, has to take the same kernels.
        use_fast_kernels(run.device, config.tf32)
        log_run(run)
        networks, classes = open_networks(config, path, known_classes(args.dataset))
        chosen = choose_classes(args, classes)
        sampler = set_up_sampler(config, run, networks)
        if not args.reconstruct:
            sampler.beginning = beginning_of(config, out, sampler, chosen)
        numbers = {name: classes.index(name) for name in chosen}
        if args.quality:
            # dpmpp_2m adds no noise, so s has no effect.
            strengths = PREVIEW_STRENGTHS if config.sampler != "dpmpp_2m" else PREVIEW_STRENGTHS[:1]
            count = QUALITY_IMAGES if args.quality_images is None else args.quality_images
            quality = set_up_quality(sampler, run, config, out, strengths, count)
            quality.check(numbers)
        # The record names the settings that the checkpoints have brought.
        write_record(run, out / config.saver.log_dir, "sample", config)
        if args.quality:
            quality.report(numbers, args.overwrite, board, stop)
        elif args.preview or args.save_steps or args.reconstruct:
            if run.is_main:
                write_pictures(sampler, args, config, numbers, out, board)
        else:
            draw_classes(sampler, run, config, numbers, args.overwrite, stop)
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
    if config.start_depth is not None and config.start_depth[0] > config.start_depth[1]:
        raise UsageError(f"{path}: start_depth: {config.start_depth} is not a range [low, high]")
    if args.reconstruct and len(args.reconstruct) > MOST_RECONSTRUCTIONS:
        raise UsageError(f"--reconstruct: {len(args.reconstruct)} images; one sheet holds {MOST_RECONSTRUCTIONS}")
    if config.sampler == "dpmpp_2m":
        if args.preview:
            raise UsageError("--preview draws a strip over s, but sampler dpmpp_2m adds no noise; use dpmpp_2m_sde")
        if config.strength[1] > 0 and not (args.quality or args.reconstruct):
            where = "--strength" if args.strength else f"{path}: strength"
            text = "has no effect with sampler dpmpp_2m, which adds no noise; use 0 0, or sampler dpmpp_2m_sde"
            raise UsageError(f"{where}: {config.strength} {text}")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect, and images that are not there."""
    if args.quality_images is not None and not args.quality:
        raise UsageError("--quality-images needs --quality")
    for name, reason in WITHOUT_STRENGTH.items():
        if args.strength and getattr(args, name):
            raise UsageError(f"--strength has no effect on --{name}, which {reason}; leave it out")
    for image in args.reconstruct or []:
        if not Path(image).is_file():
            raise UsageError(f"--reconstruct: {image} is not an image file")


def choose_classes(args: argparse.Namespace, classes: list[str]) -> list[str]:
    """The classes of the model that --class_name names.

    Raises:
        UsageError: the model has no such class, or --reconstruct, which takes one, is given several.
    """
    chosen = classes if args.class_name == "all" else [name.strip() for name in args.class_name.split(",")]
    for name in chosen:
        if name not in classes:
            raise UsageError(f"--class_name {name}: the classes of the model are {', '.join(classes)}")
    if args.reconstruct and len(chosen) > 1:
        raise UsageError(f"--reconstruct: --class_name is missing, one of {', '.join(chosen)}")
    return chosen


def beginning_of(config: EasyDict, experiment: Path, sampler: Sampler, classes: list[str]) -> Beginning | None:
    """What start_depth begins with: the images that the diffusion model of diffusion.yaml is trained on."""
    if config.start_depth is None:
        return None
    images = good_images_of_sdas(experiment, sampler.size, sampler.seed, "start_depth begins with")
    indices = {name: images.images.of_class(name) for name in classes}
    missing = [name for name, found in indices.items() if not found]
    if missing:
        where = f"{experiment / 'diffusion.yaml'} lists no good image of {', '.join(missing)}"
        raise UsageError(f"{where}, which start_depth begins with; add them, or set it to null")

    def good(name: str, share: float) -> torch.Tensor:
        return images[0, indices[name][int(share * len(indices[name]))]]["image"]

    return Beginning(good, tuple(config.start_depth))


# ---- the images of the data set --------------------------------------------------------------------------------------


def draw_classes(
    sampler: Sampler, run: Run, config: EasyDict, numbers: dict[str, int], overwrite: bool, stop: StopRequest
) -> None:
    """Draw the missing images of each class, by name and number."""
    folders = {name: SDASFolder(Path(config.workspace.root) / name) for name in numbers}
    batches = SharedBatches(config.sample_number, config.dataset.batch_size, run)
    own = {i for batch in batches for i in batch}
    drawn = [set() if overwrite else folder.indices() for folder in folders.values()]
    missing = [set(range(config.sample_number)) - indices for indices in drawn]
    progress = JobProgress(sum(map(len, missing)), sum(len(indices & own) for indices in missing), run)
    for name, number in numbers.items():
        with folder_lock(folders[name].path, run):
            draw_class(sampler, run, config, folders[name], number, overwrite, stop, progress)
    progress.close()


def draw_class(
    sampler: Sampler,
    run: Run,
    config: EasyDict,
    folder: SDASFolder,
    number: int,
    overwrite: bool,
    stop: StopRequest,
    progress: JobProgress,
) -> None:
    """Draw the missing ones of a class's images 0 .. sample_number - 1; ranks share the batches.

    Raises:
        Stopped: a signal stopped the run after a batch; the same command continues from there.
    """
    (low, high), name = config.strength, folder.path.name
    batches = SharedBatches(config.sample_number, config.dataset.batch_size, run)
    if overwrite:
        # A model that has diverged fails here, before anything is deleted.
        sampler.draw(name, number, next(iter(batches), [0])[:1], low, high)
        distributed.barrier()
    distributed.on_main(lambda: folder.begin(overwrite))
    existing = folder.indices()
    # No rank may write before every rank has listed the folder.
    distributed.barrier()
    for indices in batches:
        missing = [i for i in indices if i not in existing]
        if not missing:
            continue
        # Draw the whole batch even if few images are missing, so that a continued run gives bit-identical images.
        images = sampler.draw(name, number, indices, low, high)
        strengths = sampler.strengths(name, indices, low, high)
        for i, image, strength in zip(indices, images, strengths, strict=True):
            if i not in existing:
                folder.write(i, image, strength, sampler.seed, run.rank)
        progress.add(len(missing), name)
        if stop.signal:
            log.info("%s: stopped; the same command without --overwrite goes on", signal_name(stop.signal))
            raise Stopped(stop.signal)
    distributed.barrier()
    distributed.on_main(folder.finish)
    kept = len(existing & set(range(config.sample_number)))
    log.info(
        "%s: %s in %s, %d of them existed already%s%s",
        name,
        counted(config.sample_number, "image"),
        folder.path,
        kept,
        " (--overwrite draws them again)" if kept else "",
        f"; {progress.summary}" if progress.left else "",
    )


# ---- pictures for people ---------------------------------------------------------------------------------------------


def write_pictures(
    sampler: Sampler,
    args: argparse.Namespace,
    config: EasyDict,
    numbers: dict[str, int],
    experiment: Path,
    board: Board,
) -> None:
    """Write what --preview, --save-steps or --reconstruct ask for, for each class, by name and number."""
    vis_dir = experiment / config.saver.vis_dir
    for name, number in numbers.items():
        if args.preview:
            picture, kind, path = preview(sampler, name, number), "sdas", vis_dir / f"{name}.png"
            text = f"strengths {PREVIEW_STRENGTHS[0]:g} .. {PREVIEW_STRENGTHS[-1]:g}"
        elif args.save_steps:
            picture, kind = step_sheet(sampler, name, number, config.strength), "steps"
            path = vis_dir / f"{name}_steps.png"
            text = f"{counted(sampler.process.num_timesteps, 'step')} of sampling"
        else:
            reading = sdas_reading(experiment, sampler.size, config.color_mode)
            picture = reconstruction(sampler, number, args.reconstruct, reading, config.dataset.batch_size)
            kind, path = "reconstruction", vis_dir / f"{name}_reconstruction.png"
            text = "images, reconstructions and their differences"
        write_image(path, picture)
        board.add_image(f"{kind}/{name}", picture, 0)
        log.info("%s: %s in %s", name, text, path)


def reconstruction(sampler: Sampler, number: int, paths: list[str], reading: Preprocessing, size: int) -> np.ndarray:
    """A sheet of image files, their DDIM reconstructions, `size` at once, and the differences, whose mean is logged."""
    images = np.stack([reading.read(path) for path in paths])
    recon = np.concatenate([reconstructions(sampler, number, images[i : i + size]) for i in range(0, len(paths), size)])
    for path, difference in zip(paths, np.abs(images.astype(np.int16) - recon).mean(axis=(1, 2, 3)), strict=True):
        log.info("%s: differs from its reconstruction by %.2f grey levels on average", path, difference)
    # With the folder: test images of different defects often have the same name.
    return reconstruction_sheet(["/".join(Path(path).parts[-2:]) for path in paths], images, recon)


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
