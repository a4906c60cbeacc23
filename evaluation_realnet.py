"""Evaluate trained RealNets: tables of metrics, thresholds, a report, and a picture for every test image.

    python evaluation_realnet.py --dataset MVTec-AD --class_name bottle
    torchrun --nproc_per_node=2 evaluation_realnet.py --dataset MVTec-AD --class_name all
    python evaluation_realnet.py --dataset MVTec-AD --class_name all --target-fpr 0.01
    python evaluation_realnet.py --dataset MVTec-AD --class_name bottle --checkpoint FILE

Settings: experiments/<dataset>/realnet.yaml. Loads realnet_checkpoints/<class>/ckpt_best.pth.tar and writes its
thresholds beside it (ckpt_best.thresholds.json, for predict.py). Writes realnet_results/report.html,
metrics.{csv,json,md} and metrics_by_defect.{csv,json,md}, and [image | ground truth | anomaly map] pictures to
realnet_vis/<class>/<defect>/. Any number of ranks prints the same figures.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from easydict import EasyDict

from datasets.catalog import find
from datasets.lists import UNIFIED, listed_classes
from datasets.loaders import SharedBatches, appearance_of, build_realnet_test_set, make_loader
from datasets.realnet import RealNetTestSet
from evaluation.html_report import write_report
from evaluation.metrics import PRO_LIMIT, image_scores
from evaluation.results import ClassResult, ScoredPictures, Shown, evaluate_class, thresholds_of
from evaluation.score import GatheredMaps, avgpool_size, score_test_set
from evaluation.tables import text_table, with_mean, with_paper, write_tables
from evaluation.thresholds import Thresholds, write_thresholds
from models import build_realnet, check_realnet
from utils import cli, distributed
from utils.checkpoint import load_checkpoint, load_weights, state_dict_of
from utils.config import check_together, load_config
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.log import log, progress, set_up_logging
from utils.pictures import heat_overlay, result_picture, thumbnail, write_image

THUMBNAIL = 200  # pixels, longer side, in the report's gallery


@dataclass(frozen=True)
class Options:
    """What the command line asks for beyond the settings."""

    target_fpr: float | None
    pro_limit: float
    gallery: int
    pictures: bool


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--class_name", help="one class, several separated by commas, or all")
    parser.add_argument("--checkpoint", help="checkpoint file instead of the class's ckpt_best.pth.tar")
    parser.add_argument("--target-fpr", type=float, help="thresholds for this share of false alarms, not the best F1")
    parser.add_argument("--pro-limit", type=float, default=PRO_LIMIT, help="PRO up to this false positive rate (0.3)")
    parser.add_argument("--gallery", type=int, default=60, help="pictures of each class in report.html (60)")
    parser.add_argument("--no-pictures", action="store_true", help="no file for every test picture")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "realnet")
    config = load_config(path, args.set)
    classes = check(config, path, args.class_name)
    options = check_options(args, classes)
    out = cli.experiment_dir(args)
    with distributed.session(args.device) as run:
        set_up_logging(run, out / config.saver.log_dir, "evaluation_realnet").close()
        results: list[ClassResult] = []
        for class_name, test_set, checkpoint in models(config, classes, args, out):
            results += evaluate(config, class_name, test_set, checkpoint, run, options, out)
        if run.is_main:
            report(config, results, options, args.dataset or out.resolve().name, out / config.saver.results_dir)


def check(config: EasyDict, path: Path, class_name: str | None) -> list[str]:
    """Find what is wrong with the settings before anything is loaded; returns the classes to evaluate."""
    classes: list[str] = []

    def choose() -> None:
        classes.extend(cli.chosen_classes(class_name, config.dataset.test.meta_file, listed_classes, UNIFIED))

    check_together(
        path,
        [
            ("--class_name", choose),
            ("structure, net", lambda: check_realnet(config)),
            ("evaluator", lambda: avgpool_size(config.evaluator)),
            ("dataset", lambda: appearance_of(config.dataset)),
        ],
    )
    return classes


def check_options(args: argparse.Namespace, classes: list[str]) -> Options:
    if args.checkpoint and len(classes) > 1:
        raise UsageError("--checkpoint: evaluates one class; name it with --class_name")
    if args.target_fpr is not None and not 0 <= args.target_fpr < 1:
        raise UsageError(f"--target-fpr {args.target_fpr}: has to lie in 0 .. 1, e.g. 0.01 for 1 %")
    if not 0 < args.pro_limit <= 1:
        raise UsageError(f"--pro-limit {args.pro_limit}: has to lie above 0 and up to 1")
    return Options(args.target_fpr, args.pro_limit, max(0, args.gallery), not args.no_pictures)


def models(
    config: EasyDict, classes: list[str], args: argparse.Namespace, out: Path
) -> list[tuple[str, RealNetTestSet, Path]]:
    """The classes that can be evaluated with their test pictures and checkpoints.

    Of `all`, those that cannot be are named and left out.
    """
    found, missing = [], []
    for name in classes:
        default = out / config.saver.checkpoints_dir / name / "ckpt_best.pth.tar"
        checkpoint = Path(args.checkpoint) if args.checkpoint else default
        list_path = config.dataset.test.meta_file.replace("{}", name)
        test_set = build_realnet_test_set(config.dataset, name)
        if not len(test_set):
            missing.append(f"{list_path}: holds no picture; evaluation needs good and defective test pictures")
        elif not checkpoint.is_file():
            missing.append(f"{checkpoint} does not exist; train {name} first")
        else:
            found.append((name, test_set, checkpoint))
    if missing and (not found or args.class_name != "all"):
        raise UsageError(missing[0])
    for text in missing:
        log.info("left out: %s", text)
    return found


def evaluate(
    config: EasyDict,
    class_name: str,
    test_set: RealNetTestSet,
    checkpoint: Path,
    run: Run,
    options: Options,
    out: Path,
) -> list[ClassResult]:
    """The results of each class in a test list, on rank 0; writes thresholds and pictures."""
    loader = make_loader(
        test_set, SharedBatches(len(test_set), config.dataset.batch_size, run), config.dataset.workers, run
    )
    content = load_checkpoint(checkpoint)
    torch.manual_seed(config.random_seed)
    model = build_realnet(config, "checkpoint")
    load_weights(model, state_dict_of(content), checkpoint, "structure and net in the YAML")
    maps = score_test_set(model.to(run.device), loader, run)
    if maps is None:
        return []
    if not np.isfinite(maps.scores).all():
        raise RunError(f"{checkpoint}: its anomaly maps hold values that are not finite; train it with a lower lr")
    log.info("%s: %s, epoch %s, %d pictures", class_name, checkpoint, content.get("epoch", "?"), len(test_set))
    log.info("%s: %.1f images/s in the forward pass", class_name, maps.images_per_second)
    pictures = scored_pictures(maps, test_set, avgpool_size(config.evaluator))
    names = np.array([sample.clsname if class_name == UNIFIED else class_name for sample in test_set.samples])
    results = []
    for name in sorted(set(names)):
        chosen = np.flatnonzero(names == name)
        result = evaluate_class(name, pictures.subset(chosen), options.target_fpr, options.pro_limit)
        tell_what_is_undefined(result)
        show(result, test_set, maps, chosen, options, run, out / config.saver.vis_dir)
        results.append(result)
    # One threshold for all pictures of a model: which class a new picture is of need not be known.
    overall = (
        results[0].thresholds
        if len(results) == 1
        else thresholds_of(pictures, *pictures.rankings(), options.target_fpr)
    )
    path = write_thresholds(checkpoint, overall, {result.name: result.thresholds for result in results})
    log.info("%s: thresholds in %s", class_name, path)
    return results


def scored_pictures(maps: GatheredMaps, test_set: RealNetTestSet, window: tuple[int, int]) -> ScoredPictures:
    samples = test_set.samples
    return ScoredPictures(
        maps.scores,
        image_scores(maps.scores, window),
        maps.masks,
        np.array([sample.mask_known for sample in samples]),
        np.array([sample.label for sample in samples], dtype=bool),
        np.array([sample.kind for sample in samples]),
    )


def tell_what_is_undefined(result: ClassResult) -> None:
    if result.labels.all() or not result.labels.any():
        lacking = "good" if result.labels.all() else "defective"
        log.info("%s: no %s test picture: image metrics are absent, they need both kinds", result.name, lacking)
    if result.labels.any() and result.metrics["pixel_auroc"] is None:
        log.info("%s: no masks of defects: pixel metrics are absent", result.name)


# ---- pictures --------------------------------------------------------------------------------------------------------


def show(
    result: ClassResult,
    test_set: RealNetTestSet,
    maps: GatheredMaps,
    chosen: np.ndarray,
    options: Options,
    run: Run,
    vis_dir: Path,
) -> None:
    """Write [image | ground truth | anomaly map] of every picture, and collect the gallery: the worst errors."""
    errors = signed_errors(result)
    worst = set(np.argsort(-errors, kind="stable")[: options.gallery].tolist())
    folder = vis_dir / result.name
    for k in progress(range(len(chosen)), run, f"{result.name} pictures"):
        if not options.pictures and k not in worst:
            continue
        index = int(chosen[k])
        sample, image = test_set.samples[index], test_set.picture(index)
        mask = maps.masks[index] if sample.mask_known else None
        heat = heat_map(image, maps.scores[index], result.thresholds)
        if options.pictures:
            path = folder / sample.kind / f"{PurePosixPath(sample.filename).stem}.png"
            write_image(path, result_picture(image, mask, heat))
        if k in worst:
            truth = None if mask is None else thumbnail(mask.astype(np.uint8) * 255, THUMBNAIL)
            score, error = float(result.scores[k]), float(errors[k])
            shown = (thumbnail(image, THUMBNAIL), thumbnail(heat, THUMBNAIL), truth)
            result.gallery.append(Shown(sample.filename, sample.kind, sample.label, score, error, *shown))
    if options.pictures:
        log.info("%s: pictures in %s", result.name, folder)


def heat_map(image: np.ndarray, scores: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """The anomaly map over the picture, coloured from the class's median score (blue) to its highest (red)."""
    scale = 1 / (thresholds.high - thresholds.low)
    threshold = None if thresholds.pixel is None else (thresholds.pixel - thresholds.low) * scale
    return heat_overlay(image, (scores - thresholds.low) * scale, threshold)


def signed_errors(result: ClassResult) -> np.ndarray:
    """How far each image score lies on the wrong side of the threshold, as a share of the range of scores.

    Without a threshold, normal pictures with high scores come first.
    """
    scores, threshold = result.scores, result.thresholds.image
    scale = max(float(np.ptp(scores)), 1e-12)
    if threshold is None:
        return (scores - scores.max()) / scale
    return np.where(result.labels, threshold - scores, scores - threshold) / scale


# ---- tables and report -----------------------------------------------------------------------------------------------


def report(config: EasyDict, results: list[ClassResult], options: Options, dataset: str, folder: Path) -> None:
    """Print the tables and write them and the report."""
    table = with_mean({result.name: result.metrics for result in results})
    info = find(config.dataset.type)
    paper = info.paper if info else {}
    log.info("%s", text_table(with_paper(table, paper)))
    kinds = {f"{result.name}/{kind}": row for result in results for kind, row in result.kinds.items()}
    paths = write_tables(folder, "metrics", table, paper)
    if kinds:
        log.info("\n%s", text_table(kinds, "defect"))
        paths += write_tables(folder, "metrics_by_defect", kinds, {})
    notes = [
        f"{sum(len(result.scores) for result in results)} test pictures. PRO up to a false positive rate of "
        f"{options.pro_limit:g}. A picture is called anomalous where its score reaches the image threshold.",
        "The thresholds were chosen on these pictures, so the verdicts shown are better than those on new ones.",
    ]
    path = folder / "report.html"
    write_report(path, f"RealNet on {dataset}", notes, with_paper(table, paper), results)
    for written in [*paths, path]:
        log.info("%s", written)


if __name__ == "__main__":
    cli.run(main)
