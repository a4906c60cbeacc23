"""Train and evaluate classes x seeds x variants of the settings, for one table of means and standard deviations.

    python benchmark.py --dataset MVTec-AD --class_name all --seeds 100 101 102
    python benchmark.py --dataset MVTec-AD --class_name bottle,cable --set trainer.max_epoch=100 --jobs 4
    python benchmark.py --dataset MPDD --class_name all --variant paper: --variant bf16:trainer.amp=bf16
    python benchmark.py --dataset MPDD --class_name all --report-only

A cell is one variant, class and seed: train_realnet.py, then evaluation_realnet.py of two checkpoints (the best on the
test list as in the paper, and one that was chosen without it), in processes and a folder of their own. Cells are queued
over the GPUs, or over --jobs processes. The same command goes on after a kill: finished cells are kept, others resume.

Settings: experiments/<dataset>/realnet.yaml. Writes experiments/<dataset>/benchmark/benchmark.{csv,json,md,html} after
every cell, and the cells' files to <variant>/<class>/seed_<n>/ beside them; --output names another folder.
"""

import argparse
from pathlib import Path

from utils import arguments

SEEDS = [100, 101, 102]


def parse_args() -> argparse.Namespace:
    parser = arguments.run_parser(__doc__)
    parser.add_argument("--class_name", help="one class, several separated by commas, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="random_seed of each run (100 101 102)")
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME:KEY=VALUE,...",
        help="settings to compare under a name, beside those of --set; can be given several times",
    )
    parser.add_argument("--jobs", type=int, help="cells at a time (the number of GPUs, or 1 on a CPU)")
    parser.add_argument("--output", type=Path, help="folder of the cells and tables (experiments/<dataset>/benchmark)")
    parser.add_argument("--overwrite", action="store_true", help="make cells anew that were made with other settings")
    parser.add_argument("--report-only", action="store_true", help="train nothing; a table of the finished cells")
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

import json
import os
from collections.abc import Sequence

import torch
from easydict import EasyDict

from datasets.build import build_realnet_test_set, check_realnet_data
from datasets.catalog import find
from datasets.lists import chosen_classes
from evaluation.benchmark_cell import FOLDERS, Cell, commands
from evaluation.benchmark_table import Benchmark, text_tables, write_benchmark
from models.realnet import check_realnet
from utils import cli
from utils.config import collect_errors, load_config, plain
from utils.counts import counted
from utils.distributed import Run, pick_device, usable_cores
from utils.errors import RunError, Stopped, UsageError
from utils.files import sha256
from utils.launcher import as_one_process
from utils.lock import folder_lock
from utils.log import log, log_to_file, log_to_terminal, progress_bar
from utils.names import name_problem
from utils.processes import Job, run_jobs
from utils.run_record import REPOSITORY


def main() -> None:
    as_one_process()
    args = parse_args()
    log_to_terminal()
    root = (args.output or cli.experiment_dir(args) / "benchmark").resolve()
    cells, paper = planned(args, root)
    title = f"RealNet on {args.dataset or root.parent.name}: benchmark"
    failed: dict[Cell, str] = {}
    if args.report_only:
        report(title, cells, failed, paper, root)
        return
    with folder_lock(root):
        log_to_file(root / "benchmark.log")
        left = [cell for cell in cells if cell.changes() or cell.result() is None]
        log.info("%s, %d finished; in %s", counted(len(cells), "cell"), len(cells) - len(left), root)
        jobs = [Job(cell.name, commands(cell), cell.log) for cell in left]
        by_name = {cell.name: cell for cell in left}
        alone = Run(0, 1, torch.device("cpu"))
        ended = run_jobs(jobs, places(args, len(left)))
        try:
            for job, problem in progress_bar(ended, alone, "cells", len(left)):
                if problem:
                    failed[by_name[job.name]] = problem
                    log.warning("%s failed: %s (%s)", job.name, problem, job.log)
                else:
                    log.info("%s is finished", job.name)
                    write_benchmark(root, benchmark_of(title, cells, failed, paper))
        except Stopped:
            log.info("stopped; the same command goes on")
            raise
        if any(cell.result() for cell in cells):
            report(title, cells, failed, paper, root)
    if failed:
        lines = [f"{cell.name}: {problem}; see {cell.log}" for cell, problem in failed.items()]
        raise RunError("\n".join([f"{len(failed)} of {counted(len(cells), 'cell')} failed", *lines]))


# ---- what there is to do ---------------------------------------------------------------------------------------------


def planned(args: argparse.Namespace, root: Path) -> tuple[list[Cell], dict[str, float]]:
    """All cells in the order of their seeds, so that early tables hold all classes; and the paper's figures.

    Raises:
        UsageError: a setting, class, seed or variant is wrong, or a cell was made with other settings.
    """
    path = cli.config_path(args, "realnet")
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError("--seeds: names a seed twice")
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: has to be at least 1")
    variants = dict(map(parse_variant, args.variant or ["default:"]))
    if len(variants) < len(args.variant or [""]):
        raise UsageError("--variant: a name is given twice")
    options = (("--dataset", args.dataset), ("--config", args.config), ("--device", args.device))
    where = tuple(word for option, value in options if value for word in (option, value))
    cells = []
    for variant, settings in variants.items():
        refuse_own_keys([*args.set, *settings])
        classes = check(load_config(path, [*args.set, *settings], "realnet"), path, args.class_name)
        for seed in args.seeds:
            overrides = (*args.set, *settings, f"random_seed={seed}")
            config = load_config(path, overrides, "realnet")
            made_with = {key: value for key, value in plain(config).items() if key != "saver"}
            for class_name in classes:
                lists = {part: list_checksum(config.dataset[part].meta_file, class_name) for part in ("train", "test")}
                content = json.loads(json.dumps({"settings": made_with, "lists": lists}))
                folder = root / variant / class_name / f"seed_{seed}"
                cells.append(Cell(variant, class_name, seed, folder, overrides, content, where))
    cells.sort(key=lambda cell: args.seeds.index(cell.seed))
    changed = {cell: changes for cell in cells if (changes := cell.changes())}
    if changed and not args.overwrite:
        cell, changes = next(iter(changed.items()))
        how_many = f"{len(changed)} of {counted(len(cells), 'cell')}"
        raise UsageError(
            f"{cell.folder}: was made with other settings ({'; '.join(changes[:3])}), as {how_many}; --overwrite makes "
            "these anew, another --output or name of the variant keeps them"
        )
    info = find(config.dataset.type)
    return cells, info.paper if info else {}


def check(config: EasyDict, path: Path, class_name: str | None) -> list[str]:
    """Check the settings of a variant and the test lists before anything is trained; returns the classes."""

    def check_test_list(name: str) -> None:
        labels = {sample.label for sample in build_realnet_test_set(config.dataset, name).samples}
        if len(labels) < 2:
            lacking = " and ".join(word for label, word in enumerate(("good", "defective")) if label not in labels)
            path = config.dataset.test.meta_file.replace("{}", name)
            raise UsageError(f"{path}: holds no {lacking} image; a benchmark measures on good and defective ones")

    classes = chosen_classes(class_name, config.dataset.train.meta_file)
    checks = [("structure, net", lambda: check_realnet(config))]
    for name in classes:
        checks.append(("dataset", lambda name=name: check_realnet_data(config.dataset, name)))
        checks.append(("dataset", lambda name=name: check_test_list(name)))
    collect_errors(path, checks)
    return classes


def parse_variant(text: str) -> tuple[str, list[str]]:
    """Name and settings of "name:key=value,key=value"; commas in brackets, braces and quotes belong to a value."""
    title, colon, rest = text.partition(":")
    problem = name_problem(title)
    if not colon or problem:
        raise UsageError(
            f"--variant {text}: write it as name:key=value,key=value" + (f"; the name {problem}" if problem else "")
        )
    parts, depth, quote = [""], 0, ""
    for character in rest:
        if quote or character in "\"'":
            quote = "" if character == quote else quote or character
        depth += (character in "[{") - (character in "]}") if not quote else 0
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return title, [part.strip() for part in parts if part.strip()]


def refuse_own_keys(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == "random_seed":
            raise UsageError(f"{override}: the benchmark sets it; name the seeds with --seeds")
        if key.removeprefix("saver.") in FOLDERS:
            raise UsageError(f"{override}: the benchmark sets it; name a folder for everything with --output")


def list_checksum(meta_file: str, class_name: str) -> str:
    path = Path(meta_file.replace("{}", class_name))
    return sha256(path) if path.is_file() else "missing"


def places(args: argparse.Namespace, most: int) -> list[dict[str, str]]:
    """The environment variables of the processes that run at the same time."""
    gpus: list[str] = []
    if pick_device(args.device).type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    count = max(1, min(args.jobs or len(gpus) or 1, most))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    chosen = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(count)]
    search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return [{**place, "OMP_NUM_THREADS": threads, "PYTHONPATH": search} for place in chosen]


# ---- the table -------------------------------------------------------------------------------------------------------


def benchmark_of(title: str, cells: Sequence[Cell], failed: dict[Cell, str], paper: dict[str, float]) -> Benchmark:
    finished, missing = [], []
    order = {variant: i for i, variant in enumerate(dict.fromkeys(cell.variant for cell in cells))}
    for cell in sorted(cells, key=lambda cell: (order[cell.variant], cell.class_name, cell.seed)):
        result = None if cell in failed else cell.result()
        if result is None:
            missing.append((cell.variant, cell.class_name, cell.seed, failed.get(cell, "not finished")))
        else:
            finished.append(result)
    return Benchmark(title, finished, missing, paper)


def report(title: str, cells: Sequence[Cell], failed: dict[Cell, str], paper: dict[str, float], root: Path) -> None:
    """Print the table and write it to the folder."""
    benchmark = benchmark_of(title, cells, failed, paper)
    if not benchmark.cells:
        raise UsageError(f"{root}: holds no finished cell of these {len(cells)}; run the command without --report-only")
    log.info("%s\n", text_tables(benchmark))
    for note in benchmark.notes():
        log.info("%s", note)
    for path in write_benchmark(root, benchmark):
        log.info("%s", path)


if __name__ == "__main__":
    cli.run(main)
