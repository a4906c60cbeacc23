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
from utils.choices import BEST_RULE, FORMATS, NO_PICTURES, PNG, RULES


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
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from easydict import EasyDict

from datasets.build import build_realnet_test_set
from datasets.catalog import find
from datasets.lists import UNIFIED, chosen_classes
from datasets.realnet import RealNetTestSet
from evaluation.detector import tiles_of
from evaluation.html_report import write_report
from evaluation.metrics import PRO_LIMIT
from evaluation.results import ClassResult, draw_images
from evaluation.score import pooling_window
from evaluation.scored_checkpoint import (
    Options,
    ScoredCheckpoint,
    save_thresholds,
    score_checkpoint,
    thresholds_to_save,
)
from evaluation.selections import SELECTION_NOTE, other_selections, selection_of, selection_rows
from evaluation.tables import text_table, with_mean, with_paper, write_tables
from evaluation.trained_model import overruled_settings
from evaluation.training_curve import read_validations
from utils import cli, distributed
from utils.checkpoint import BEST
from utils.config import collect_errors, load_config
from utils.counts import counted
from utils.device import use_exact_kernels
from utils.distributed import Run
from utils.errors import UsageError
from utils.lock import folder_lock
from utils.log import log, set_up_logging
from utils.precision import check_forward_precision
from utils.run_record import identity_of, log_run, write_record
from utils.signals import StopRequest, stop_requests


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
        log_run(run)
        results: list[ClassResult] = []
        evaluable = evaluable_classes(config, classes, args, out)
        write_record(run, out / config.saver.log_dir, "evaluation_realnet", config)
        for class_name, test_set, checkpoint in evaluable:
            results += evaluate(config, class_name, test_set, checkpoint, run, options, out, stop)
        if run.is_main:
            report(config, results, options, args.dataset or out.resolve().name, out / config.saver.results_dir)
            checkpoint = args.checkpoint or evaluable[0][2].parent
            log.info("Next: python %s", cli.predict_command(checkpoint, options.for_predict))


def check(config: EasyDict, path: Path, class_name: str | None) -> list[str]:
    """Check the settings before anything is loaded; returns the classes to evaluate."""
    classes: list[str] = []

    def choose_classes() -> None:
        classes.extend(chosen_classes(class_name, config.dataset.test.meta_file))

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


def log_checkpoint(class_name: str, checkpoint: Path, scored: ScoredCheckpoint, config: EasyDict) -> None:
    """Print which model was scored, how fast, and what of the YAML it overrules."""
    trained, pictured = scored.trained, scored.pictured
    for line in overruled_settings(trained.config, config):
        log.info("%s: uses the checkpoint's %s", class_name, line)
    log.info("%s: %s, epoch %s, %s", class_name, checkpoint, trained.epoch, counted(len(pictured), "image"))
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
    paths += write_tables(folder, "metrics_by_defect", by_defect, {}, options.measure_note)
    if by_defect:
        log.info("\n%s", text_table(by_defect, "defect"))
    by_selection = {name: row for result in results for name, row in selection_rows(result).items()}
    paths += write_tables(folder, "metrics_by_selection", by_selection, {}, SELECTION_NOTE)
    if by_selection:
        log.info("\n%s", text_table(by_selection, "selection"))
    for result in results:
        log_verdict(result)
    notes = [
        f"{counted(sum(len(result.scores) for result in results), 'test image')}. PRO up to a false positive rate of "
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
