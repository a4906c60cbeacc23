"""Evaluate trained RealNets: a table of metrics, and a picture for every test image.

    python evaluation_realnet.py --dataset MVTec-AD --class_name bottle
    torchrun --nproc_per_node=2 evaluation_realnet.py --dataset MVTec-AD --class_name all
    python evaluation_realnet.py --dataset MVTec-AD --class_name bottle --checkpoint FILE

Settings: experiments/<dataset>/realnet.yaml. Loads realnet_checkpoints/<class>/ckpt_best.pth.tar, writes
realnet_results/metrics.{csv,json,md} and [image | ground truth | anomaly map] pictures to
realnet_vis/<class>/<defect>/. Any number of ranks prints the same figures.
"""

import argparse
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from easydict import EasyDict

from datasets.loaders import SharedBatches, build_realnet_test_set, make_loader
from datasets.meta import UNIFIED, Sample, listed_classes
from datasets.realnet import RealNetTestSet
from models import build_realnet
from utils import cli, distributed
from utils.checkpoint import load_checkpoint, load_weights, state_dict_of
from utils.config import load_config
from utils.distributed import Run
from utils.errors import UsageError
from utils.log import log, progress, set_up_logging
from utils.metrics import anomaly_metrics
from utils.report import Row, text_table, with_mean, write_tables
from utils.scoring import GatheredMaps, avgpool_size, score_test_set
from utils.visualize import result_picture, write_image


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--class_name", help="one class, several separated by commas, or all")
    parser.add_argument("--checkpoint", help="checkpoint file instead of the class's ckpt_best.pth.tar")
    parser.add_argument("--no-pictures", action="store_true", help="metrics only")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = load_config(cli.config_path(args, "realnet"), args.set)
    classes = cli.chosen_classes(args.class_name, config.dataset.test.meta_file, listed_classes, UNIFIED)
    if args.checkpoint and len(classes) > 1:
        raise UsageError("--checkpoint: evaluates one class; name it with --class_name")
    out = cli.experiment_dir(args)
    with distributed.session(args.device) as run:
        set_up_logging(run, out / config.saver.log_dir, "evaluation_realnet").close()
        results: dict[str, Row] = {}
        for class_name in testable(config, classes):
            default = out / config.saver.checkpoints_dir / class_name / "ckpt_best.pth.tar"
            checkpoint = Path(args.checkpoint) if args.checkpoint else default
            results |= evaluate(config, class_name, checkpoint, run, None if args.no_pictures else out)
        if run.is_main:
            table = with_mean(results)
            log.info("%s", text_table(table))
            for path in write_tables(out / config.saver.results_dir, table):
                log.info("%s", path)


def testable(config: EasyDict, classes: list[str]) -> list[str]:
    """The classes whose test lists hold pictures; the others are named."""
    empty = [name for name in classes if not len(build_realnet_test_set(config.dataset, name))]
    path = config.dataset.test.meta_file.replace("{}", empty[0]) if empty else ""
    if len(empty) == len(classes):
        raise UsageError(f"{path}: holds no picture; evaluation needs good and defective test pictures")
    for name in empty:
        log.info("%s: left out, its test list is empty; evaluation needs good and defective pictures", name)
    return [name for name in classes if name not in empty]


def evaluate(config: EasyDict, class_name: str, checkpoint: Path, run: Run, out: Path | None) -> dict[str, Row]:
    """Metrics of each class in a test list, on rank 0; writes pictures under `out` where it is given."""
    test_set = build_realnet_test_set(config.dataset, class_name)
    loader = make_loader(
        test_set, SharedBatches(len(test_set), config.dataset.batch_size, run), config.dataset.workers, run
    )
    content = load_checkpoint(checkpoint)
    torch.manual_seed(config.random_seed)
    model = build_realnet(config, "checkpoint")
    load_weights(model, state_dict_of(content), checkpoint, "structure and net in the YAML")
    maps = score_test_set(model.to(run.device), loader, run)
    log.info("%s: %s, epoch %s, %d pictures", class_name, checkpoint, content.get("epoch", "?"), len(test_set))
    if maps is None:
        return {}
    rows: dict[str, Row] = {}
    for name in sorted({sample.clsname for sample in test_set.samples}) if class_name == UNIFIED else [class_name]:
        chosen = [i for i, sample in enumerate(test_set.samples) if class_name != UNIFIED or sample.clsname == name]
        rows[name] = class_metrics(maps, test_set.samples, chosen, avgpool_size(config.evaluator))
        if out is not None:
            threshold = rows[name]["pixel_threshold"]
            write_pictures(test_set, maps, chosen, threshold, out / config.saver.vis_dir / name, run)
    return rows


def class_metrics(maps: GatheredMaps, samples: list[Sample], chosen: list[int], window: tuple[int, int]) -> Row:
    """All metrics of some pictures; pixel metrics over those whose mask is known, if any has a defect."""
    labels = np.array([samples[i].label for i in chosen], dtype=bool)
    if labels.all() or not labels.any():
        lacking = "good" if labels.all() else "defective"
        log.info(
            "%s: no %s test picture: metrics are absent, they need both kinds", samples[chosen[0]].clsname, lacking
        )
    row = anomaly_metrics(maps.scores[chosen], None, window, labels)
    known = [i for i in chosen if samples[i].mask_known]
    if labels.any() and not maps.masks[known].any():
        log.info("%s: no masks of defects: pixel metrics are absent", samples[chosen[0]].clsname)
    if maps.masks[known].any():
        pixel = anomaly_metrics(maps.scores[known], maps.masks[known], window)
        row |= {name: value for name, value in pixel.items() if name.startswith(("pixel", "pro"))}
    return row


def write_pictures(
    test_set: RealNetTestSet,
    maps: GatheredMaps,
    chosen: list[int],
    threshold: float | None,
    folder: Path,
    run: Run,
) -> None:
    """[image | ground truth | anomaly map with the contour of the best-F1 threshold], one file per test picture.

    Colours span the scores of the class, from its median score (blue) to its highest (red).
    """
    low, high = float(np.median(maps.scores[chosen])), float(maps.scores[chosen].max())
    scale = 1 / max(high - low, 1e-6)
    for i in progress(chosen, run, f"{folder.name} pictures"):
        sample = test_set.samples[i]
        picture = result_picture(
            test_set.picture(i),
            maps.masks[i] if sample.mask_known else None,
            (maps.scores[i] - low) * scale,
            None if threshold is None else (threshold - low) * scale,
        )
        write_image(folder / sample.kind / f"{PurePosixPath(sample.filename).stem}.png", picture)
    log.info("%s: pictures in %s", folder.name, folder)


if __name__ == "__main__":
    cli.run(main)
