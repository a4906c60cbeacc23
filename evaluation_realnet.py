"""Evaluate trained RealNets: tables of metrics, thresholds, a report, and a picture of every test image.

    python evaluation_realnet.py --dataset MVTec-AD --class_name bottle
    torchrun --nproc_per_node=2 evaluation_realnet.py --dataset MVTec-AD --class_name all
    python evaluation_realnet.py --dataset MVTec-AD --class_name all --target-fpr 0.01
    python evaluation_realnet.py --dataset MVTec-AD --class_name all --full-size
    python evaluation_realnet.py --dataset MyParts --class_name bolts --tile 512 --overlap 64
    python evaluation_realnet.py --dataset MVTec-AD --class_name bottle --checkpoint FILE

Settings: experiments/<dataset>/realnet.yaml. Loads realnet_checkpoints/<class>/ckpt_best.pth.tar and writes its
thresholds beside it (ckpt_best.thresholds.json, for predict.py): those of the good images that training held out, or
else the best F1 on the test list. Writes realnet_results/report.html, metrics.{csv,json,md}, metrics_by_defect and
metrics_by_selection, which compares the checkpoint that is best on the test list with the one that was chosen without
it, and [image | ground truth | anomaly map] pictures to realnet_vis/<class>/<defect type>/. The figures do not depend
on the number of ranks. --tile only adds thresholds for predict.py --tile. Thresholds hold for the --precision that they
were chosen in.
"""

import argparse

from utils import arguments
from utils.choices import FORMATS, NO_PICTURES, PNG

HELD_OUT_RULE, BEST_RULE = RULES = ("held-out", "best-f1")


def parse_args() -> argparse.Namespace:
    parser = arguments.run_parser(__doc__)
    parser.add_argument("--class_name", help="one class, several separated by commas, or all")
    parser.add_argument("--checkpoint", help="checkpoint file instead of the class's ckpt_best.pth.tar")
    rule_help = "thresholds from held-out good images (default, if the checkpoint has some) or the best F1 on the list"
    parser.add_argument("--threshold-rule", choices=RULES, help=rule_help)
    fpr_help = (
        "share of false alarms that thresholds are chosen by (held-out: 0.01; without held-out images, not by F1)"
    )
    parser.add_argument("--target-fpr", type=float, help=fpr_help)
    parser.add_argument("--pro-limit", type=float, help="highest false positive rate in PRO (0.3)")
    parser.add_argument("--tile", type=int, help="score in square tiles with this side, as predict.py --tile does")
    parser.add_argument("--overlap", type=int, help="pixels that neighbouring tiles share (64, at most tile / 4)")
    parser.add_argument("--full-size", action="store_true", help="pixel metrics at the images' own sizes")
    parser.add_argument("--gallery", type=int, default=60, help="test images per class in report.html (60)")
    pictures = parser.add_mutually_exclusive_group()
    heat_help = "format of the picture of each test image (png); jpg is written in a sixth of the time"
    pictures.add_argument("--heatmaps", choices=FORMATS, default=PNG, help=heat_help)
    no_help = "do not write a picture of each test image, as --heatmaps none"
    pictures.add_argument("--no-pictures", dest="heatmaps", action="store_const", const=NO_PICTURES, help=no_help)
    arguments.add_precision(parser)
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

import shlex
from collections.abc import Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict

from datasets.build import build_realnet_test_set, preprocessing_of
from datasets.catalog import find
from datasets.lists import UNIFIED, listed_classes
from datasets.loaders import SharedBatches, make_loader
from datasets.realnet import RealNetTestSet
from evaluation.detector import Detector, Tiles, tiles_of
from evaluation.html_report import write_report
from evaluation.metrics import PRO_LIMIT
from evaluation.normal_scores import TARGET_FPR
from evaluation.results import ClassResult, draw_images, evaluate_class
from evaluation.score import ScoredImages, at_input_size, at_own_sizes, pooling_window, predict_maps
from evaluation.selections import SELECTION_NOTE, other_selections, selection_of, selection_rows
from evaluation.tables import text_table, with_mean, with_paper, write_tables
from evaluation.thresholds import (
    Thresholds,
    heat_range,
    of_normals,
    read_thresholds,
    sidecar,
    thresholds_of,
    write_thresholds,
)
from evaluation.tiled_scores import score_in_tiles, score_normals
from evaluation.trained_model import TrainedModel, load_trained, overruled_settings
from evaluation.training_curve import read_validations
from utils import cli, distributed
from utils.checkpoint import BEST, has_finite_weights
from utils.config import collect_errors, load_config
from utils.device import use_exact_kernels
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.lock import folder_lock
from utils.log import log, set_up_logging
from utils.precision import FP32, cast_weights, check_forward_precision
from utils.run_record import identity_of, record_run
from utils.signals import StopRequest, stop_requests


@dataclass(frozen=True)
class Options:
    """What the command line asks for beyond the settings."""

    rule: str | None
    target_fpr: float | None
    pro_limit: float
    gallery: int
    pictures: str
    other_checkpoint: bool
    full_size: bool
    tiles: Tiles | None
    precision: str

    @property
    def measure_note(self) -> str:
        """At which size the pixel metrics are taken, and in which precision."""
        return self._size_note + ("" if self.precision == FP32 else f" The forward passes ran in {self.precision}.")

    @property
    def _size_note(self) -> str:
        if self.tiles:
            return f"Images were scored in tiles of {self.tiles.name}; pixel metrics are at the images' own sizes."
        where = "the images' own sizes (--full-size)" if self.full_size else "the model's input size"
        return f"Pixel metrics compare maps and masks at {where}."


def main() -> None:
    args = parse_args()
    path = cli.config_path(args, "realnet")
    config = load_config(path, args.set, "realnet")
    classes = check(config, path, args.class_name)
    options = check_options(args, classes, config.dataset.batch_size)
    out = cli.experiment_dir(args)
    with distributed.session(args.device, identity_of(config, classes=classes)) as run, stop_requests(run) as stop:
        check_forward_precision(options.precision, run.device)
        set_up_logging(run, out / config.saver.log_dir, "evaluation_realnet", config.saver.keep_pictures).close()
        use_exact_kernels(run.device)
        record_run(run, out / config.saver.log_dir, "evaluation_realnet", config)
        results: list[ClassResult] = []
        evaluable = evaluable_classes(config, classes, args, out)
        for class_name, test_set, checkpoint in evaluable:
            results += evaluate(config, class_name, test_set, checkpoint, run, options, out, stop)
        if run.is_main:
            report(config, results, options, args.dataset or out.resolve().name, out / config.saver.results_dir)
            checkpoint = args.checkpoint or evaluable[0][2].parent
            precision = "" if options.precision == FP32 else f" --precision {options.precision}"
            log.info("Next: python %s", cli.predict_command(checkpoint, precision))


def check(config: EasyDict, path: Path, class_name: str | None) -> list[str]:
    """Check the settings before anything is loaded; returns the classes to evaluate."""
    classes: list[str] = []

    def choose_classes() -> None:
        classes.extend(cli.chosen_classes(class_name, config.dataset.test.meta_file, listed_classes, UNIFIED))

    collect_errors(
        path,
        [
            ("--class_name", choose_classes),
            ("evaluator", lambda: pooling_window(config.evaluator)),
        ],
    )
    return classes


def check_options(args: argparse.Namespace, classes: list[str], batch_size: int) -> Options:
    if args.checkpoint and len(classes) > 1:
        raise UsageError("--checkpoint: evaluates one class; name it with --class_name")
    if args.target_fpr is not None and not 0 <= args.target_fpr < 1:
        raise UsageError(f"--target-fpr {args.target_fpr}: has to lie in 0 .. 1, e.g. 0.01 for 1 %")
    if args.target_fpr is not None and args.threshold_rule == BEST_RULE:
        raise UsageError(f"--threshold-rule {BEST_RULE} has no rate of false alarms; leave --target-fpr out")
    pro_limit = PRO_LIMIT if args.pro_limit is None else args.pro_limit
    if not 0 < pro_limit <= 1:
        raise UsageError(f"--pro-limit {pro_limit}: has to lie above 0 and up to 1")
    other = args.checkpoint is not None
    return Options(
        args.threshold_rule,
        args.target_fpr,
        pro_limit,
        max(0, args.gallery),
        args.heatmaps,
        other,
        args.full_size,
        tiles_of(args.tile, args.overlap, batch_size),
        args.precision,
    )


def evaluable_classes(
    config: EasyDict, classes: list[str], args: argparse.Namespace, out: Path
) -> list[tuple[str, RealNetTestSet, Path]]:
    """(class, test set, checkpoint) for classes that have both. Other classes are an error, or left out for `all`."""
    evaluable, missing = [], []
    for name in classes:
        default = out / config.saver.checkpoints_dir / name / BEST
        checkpoint = Path(args.checkpoint) if args.checkpoint else default
        list_path = config.dataset.test.meta_file.replace("{}", name)
        test_set = build_realnet_test_set(config.dataset, name)
        if not len(test_set):
            text = f"{list_path}: holds no image; evaluation needs good and defective test images"
            missing.append(text + f" (predict.py works without: --checkpoint {shlex.quote(str(checkpoint.parent))})")
        elif not checkpoint.is_file():
            missing.append(f"{checkpoint} does not exist; train {name} first")
        else:
            evaluable.append((name, test_set, checkpoint))
    if missing and (not evaluable or args.class_name != "all"):
        raise UsageError(missing[0])
    for text in missing:
        log.info("left out: %s", text)
    return evaluable


def evaluate(
    config: EasyDict,
    class_name: str,
    test_set: RealNetTestSet,
    checkpoint: Path,
    run: Run,
    options: Options,
    out: Path,
    stop: StopRequest,
) -> list[ClassResult]:
    """The results of each class in a test list, on rank 0; writes thresholds and pictures."""
    pictured = range(len(test_set)) if options.pictures != NO_PICTURES or options.gallery else ()
    scored = score_checkpoint(checkpoint, config, test_set, run, options, pictured, stop)
    others: dict[str, ScoredCheckpoint] = {}
    if not (options.other_checkpoint or options.tiles):
        for selection, file in other_selections(checkpoint, selection_of(scored.trained)).items():
            same = file.samefile(checkpoint)
            others[selection] = scored if same else score_checkpoint(file, config, test_set, run, options, (), stop)
    if scored.pictured is None:
        return []
    log_checkpoint(class_name, checkpoint, scored, config)
    names = scored.pictured.classes if class_name == UNIFIED else np.full(len(test_set), class_name)
    results = []
    for name in sorted(set(names.tolist())):
        chosen = names == name
        result = class_result(name, chosen, scored, others, options)
        if not options.other_checkpoint:
            result.training = read_validations(out / config.saver.log_dir / class_name / "train_realnet.jsonl")
        log_undefined_metrics(result)
        folder = None if options.pictures == NO_PICTURES else out / config.saver.vis_dir / name
        # On rank 0 alone, which is the only one here.
        with folder_lock(folder) if folder else nullcontext():
            draw_images(result, scored.pictured.subset(chosen), options.gallery, folder, run, stop, options.pictures)
        results.append(result)
    chosen_on = config.dataset.test.meta_file.replace("{}", class_name)
    save_thresholds(checkpoint, thresholds_to_save(scored, checkpoint, results, options, chosen_on), options)
    return results


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A checkpoint's model with what it gives on a test list; on other ranks than 0, the model alone.

    Args:
        trained: the model.
        pictured: its maps at its input size, for pictures.
        measured: its maps at the size for pixel metrics.
        held_out: the thresholds of held-out good images; None if the list shall give them.
    """

    trained: TrainedModel
    pictured: ScoredImages | None
    measured: ScoredImages | None
    held_out: Thresholds | None

    def evaluate(self, name: str, chosen: np.ndarray, options: Options) -> ClassResult:
        """The result of a class, whose images a mask (N,) chooses."""
        thresholds = None if self.held_out is None else self.held_out.classes.get(name, self.held_out)
        return evaluate_class(name, self.measured.subset(chosen), options.target_fpr, options.pro_limit, thresholds)


def class_result(
    name: str, chosen: np.ndarray, scored: ScoredCheckpoint, others: dict[str, ScoredCheckpoint], options: Options
) -> ClassResult:
    """The result of a class, beside those of checkpoints that were selected otherwise.

    Args:
        chosen: (N,) bool, its images in the test list.
    """
    result = scored.evaluate(name, chosen, options)
    result.others = {selection: other.evaluate(name, chosen, options).metrics for selection, other in others.items()}
    result.selection = selection_of(scored.trained)
    seen = scored.trained.known(sample.filename for sample in scored.measured.subset(chosen).samples)
    result.verdict.doubts.extend([seen] if seen else [])
    return result


def score_checkpoint(
    checkpoint: Path,
    config: EasyDict,
    test_set: RealNetTestSet,
    run: Run,
    options: Options,
    pictured: Collection[int],
    stop: StopRequest,
) -> ScoredCheckpoint:
    """Load a checkpoint, and score the test list and, where thresholds need it, its held-out good images.

    Args:
        pictured: indices of the images to keep for pictures.

    Raises:
        UsageError: see check_threshold_options.
        RunError: weights or maps are not finite.
    """
    torch.manual_seed(config.random_seed)
    trained = load_trained(checkpoint, config)
    check_threshold_options(trained, checkpoint, options)
    test_set = RealNetTestSet(test_set.images, preprocessing_of(trained.config.dataset))
    if options.tiles:
        detector = Detector.of(trained, None, run.device, options.precision)
        measured = score_in_tiles(detector, test_set, options.tiles, run, pictured, stop)
        scored = None if measured is None else at_input_size(measured, test_set)
    else:
        batches = SharedBatches(len(test_set), config.dataset.batch_size, run)
        loader = make_loader(test_set, batches, config.dataset.workers, run)
        window, model = pooling_window(trained.config.evaluator), trained.network.to(run.device)
        cast_weights(model, options.precision)
        scored = predict_maps(model, test_set, loader, run, window, options.precision, pictured, stop)
        if scored is not None and not (scored.finite and has_finite_weights(model)):
            raise RunError(f"{checkpoint}: its weights or anomaly maps are not finite; train it again with a lower lr")
        resized = options.full_size and scored is not None
        measured = at_own_sizes(scored, test_set, run, stop) if resized else scored
    image_dir = Path(config.dataset.image_reader.kwargs.image_dir)
    own = held_out_thresholds(trained, image_dir, run, options, stop)
    return ScoredCheckpoint(trained, scored, measured, own)


def check_threshold_options(trained: TrainedModel, checkpoint: Path, options: Options) -> None:
    """Before anything is scored.

    Raises:
        UsageError: the checkpoint's held-out good images cannot give the thresholds that are asked for.
    """
    if trained.held_out is None:
        if options.rule == HELD_OUT_RULE:
            raise UsageError(
                f"--threshold-rule {HELD_OUT_RULE}: {checkpoint} has no held-out good images; train it with "
                "dataset.train.validation_fraction, e.g. 0.2"
            )
    elif options.rule != BEST_RULE and options.target_fpr == 0:
        raise UsageError("--target-fpr 0: held-out good images can promise no such rate; pass one above 0, e.g. 0.01")


def held_out_thresholds(
    trained: TrainedModel, image_dir: Path, run: Run, options: Options, stop: StopRequest
) -> Thresholds | None:
    """The thresholds that held-out good images give; None if there are none, or if the list shall give them.

    On other ranks than 0, always None.

    Args:
        image_dir: the folder of the held-out images, for tiles or another precision than that of the checkpoint.
    """
    if options.rule == BEST_RULE or trained.held_out is None:
        return None
    target, held_out = options.target_fpr or TARGET_FPR, trained.held_out
    if options.tiles is None and options.precision == held_out.precision:
        return trained.own_thresholds(target) if run.is_main else None
    detector = Detector.of(trained, None, run.device, options.precision)
    preprocessing = preprocessing_of(trained.config.dataset)
    normals = {}
    for name, files in held_out.files.items():
        paths = [image_dir / file for file in files]
        normals[name] = score_normals(detector, preprocessing, paths, held_out.parts_of(name), options.tiles, run, stop)
    return of_normals(normals, target, held_out.low, held_out.high, trained.fingerprint) if run.is_main else None


def thresholds_on_list(
    scored: ScoredImages, results: list[ClassResult], options: Options, fingerprint: str, chosen_on: str
) -> Thresholds:
    """The thresholds from the evaluated list: for all images, and for each class if the model serves several."""
    if len(results) == 1:
        thresholds = replace(results[0].thresholds, class_name=results[0].name)
    else:
        # The thresholds for all images are for new images of unknown class.
        rankings = scored.rankings()
        thresholds = thresholds_of(scored.scores, scored.maps, scored.labels, *rankings, options.target_fpr)
        thresholds = replace(thresholds, classes={result.name: result.thresholds for result in results})
    return replace(thresholds, fingerprint=fingerprint, chosen_on=chosen_on)


def thresholds_to_save(
    scored: ScoredCheckpoint, checkpoint: Path, results: list[ClassResult], options: Options, chosen_on: str
) -> Thresholds:
    """What the sidecar shall hold: thresholds of held-out images, with the list's range of heat maps, or of the list.

    With tiles, they stand beside those for whole images that are there.
    """
    trained, chosen = scored.trained, scored.held_out
    if chosen is None:
        chosen = thresholds_on_list(scored.measured, results, options, trained.fingerprint, chosen_on)
    else:
        low, high = heat_range(scored.measured.maps)
        classes = {result.name: result.thresholds for result in results} if chosen.classes else {}
        chosen = replace(chosen, low=low, high=high, classes={**chosen.classes, **classes})
    chosen = chosen.measured_in(options.precision)
    if options.tiles is None:
        return chosen
    none = Thresholds(None, None, "none for whole images", class_name=chosen.class_name)
    whole = trained.thresholds(checkpoint) or none
    return replace(whole.with_tiled(options.tiles.name, chosen), fingerprint=trained.fingerprint)


def save_thresholds(checkpoint: Path, thresholds: Thresholds, options: Options) -> None:
    """Write the sidecar.

    An evaluation of a checkpoint on another list does not replace the thresholds from the model's own test list.
    """
    before = None
    with suppress(UsageError):  # a broken file is replaced
        before = read_thresholds(checkpoint)
    same_model = before is not None and before.fingerprint == thresholds.fingerprint
    if same_model and options.other_checkpoint and before.chosen_on not in ("", thresholds.chosen_on):
        text = "%s was chosen on %s and is kept; delete it to have the thresholds of %s"
        log.warning(text, sidecar(checkpoint), before.chosen_on, thresholds.chosen_on)
        return
    if same_model:
        thresholds = thresholds.keeping_tiles(before)
    path = write_thresholds(checkpoint, thresholds)
    log.info("thresholds in %s: %s", path, thresholds.rule)


def log_checkpoint(class_name: str, checkpoint: Path, scored: ScoredCheckpoint, config: EasyDict) -> None:
    """Print which model was scored, how fast, and what of the YAML it overrules."""
    trained, pictured = scored.trained, scored.pictured
    for line in overruled_settings(trained.config, config):
        log.info("%s: uses the checkpoint's %s", class_name, line)
    log.info("%s: %s, epoch %s, %d images", class_name, checkpoint, trained.epoch, len(pictured))
    if pictured.images_per_second:
        log.info("%s: %.1f images/s in the forward pass", class_name, pictured.images_per_second)


def log_undefined_metrics(result: ClassResult) -> None:
    if result.labels.all() or not result.labels.any():
        lacking = "good" if result.labels.all() else "defective"
        log.info("%s: no %s test image, so no image metrics: they need both", result.name, lacking)
    if result.labels.any() and result.metrics["pixel_auroc"] is None:
        log.info("%s: no masks of defects, so no pixel metrics", result.name)


def log_verdict(result: ClassResult) -> None:
    """Print the counts and intervals of a class, and what is doubtful about them."""
    verdict, threshold = result.verdict, result.thresholds
    log.info("%s: %s", result.name, verdict.counts())
    if threshold.image is not None:
        log.info("  threshold %.4g: %s", threshold.image, threshold.rule)
    if verdict.intervals():
        log.info("  %s (bootstrap over images)", verdict.intervals())
    if verdict.left_out():
        log.info("  %s", verdict.left_out())
    for doubt in verdict.doubts:
        log.warning("  warning: %s is %s", result.name, doubt)


# ---- tables and report -----------------------------------------------------------------------------------------------


def report(config: EasyDict, results: list[ClassResult], options: Options, dataset: str, folder: Path) -> None:
    """Print the tables, and write them and the report to a folder."""
    table = with_mean({result.name: result.metrics for result in results})
    info = find(config.dataset.type)
    paper = info.paper if info else {}
    log.info("%s", text_table(with_paper(table, paper)))
    log.info("%s", options.measure_note)
    by_defect = {f"{result.name}/{defect}": row for result in results for defect, row in result.by_defect_type.items()}
    paths = write_tables(folder, "metrics", table, paper, options.measure_note)
    if by_defect:
        log.info("\n%s", text_table(by_defect, "defect"))
        paths += write_tables(folder, "metrics_by_defect", by_defect, {}, options.measure_note)
    by_selection = {name: row for result in results for name, row in selection_rows(result).items()}
    if by_selection:
        log.info("\n%s", text_table(by_selection, "selection"))
        paths += write_tables(folder, "metrics_by_selection", by_selection, {}, SELECTION_NOTE)
    for result in results:
        log_verdict(result)
    notes = [
        f"{sum(len(result.scores) for result in results)} test images. PRO up to a false positive rate of "
        f"{options.pro_limit:g}. An image is called anomalous if its score reaches the image threshold.",
        options.measure_note,
    ]
    if any(result.thresholds.normal is None for result in results):
        notes.append("The thresholds were chosen on these images, so verdicts on new images will be less accurate.")
    path = folder / "report.html"
    write_report(path, f"RealNet on {dataset}", notes, with_paper(table, paper), results, by_selection)
    for file in [*paths, path]:
        log.info("%s", file)


if __name__ == "__main__":
    cli.run(main)
