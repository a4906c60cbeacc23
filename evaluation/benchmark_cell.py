"""One cell of a benchmark: a training and its evaluations in a folder of their own, as commands that can be resumed."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.benchmark_table import cell_name
from evaluation.selections import FILES, LAST, SYNTHETIC, TEST
from evaluation.tables import MEAN
from evaluation.training_curve import read_validations
from utils.checkpoint import BEST, NEXT, PREVIOUS, files_of_run
from utils.config import changed_settings
from utils.errors import UsageError
from utils.files import write_text
from utils.lock import folder_lock
from utils.log import log
from utils.run_record import REPOSITORY, code_commit

# For each way to choose a checkpoint, the files in question: the first one that the training has written.
CHOSEN = {"test": (FILES[TEST], BEST), "no_test": (FILES[SYNTHETIC], FILES[LAST])}
# Files of a cell, in the order in which they are written.
SETTINGS, ATTEMPT, TRAINED, COST, RESULT = "cell.json", "attempt.json", "trained.json", "cost.json", "result.json"
FOLDERS = {"checkpoints_dir": "checkpoints", "log_dir": "log", "vis_dir": "vis", "results_dir": "results"}


@dataclass(frozen=True, eq=False)
class Cell:
    """One training and its evaluations.

    Args:
        overrides: for --set, without those of folders.
        made_with: settings and checksums of the image lists, which a finished cell has to agree with.
        where: the options --dataset, --config and --device for all scripts.
    """

    variant: str
    class_name: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    made_with: dict[str, Any]
    where: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{cell_name(self.variant, self.class_name)}, seed {self.seed}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / FOLDERS["checkpoints_dir"] / self.class_name

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def result(self) -> dict[str, Any] | None:
        """What result_of has written once the cell was finished, else None."""
        return read_json(self.folder / RESULT)

    def changes(self) -> list[str]:
        """How the settings differ from those that the cell's folder was made with."""
        before = read_json(self.folder / SETTINGS)
        return [] if before is None else changed_settings(before, self.made_with)


def commands(cell: Cell) -> Iterator[list[str] | None]:
    """The commands of a cell, one after the other; writes its result at the end."""
    waits = False
    while not is_free(cell.checkpoints, say=not waits):
        waits = True
        yield None
    if cell.changes():
        shutil.rmtree(cell.folder)
    write_json(cell.folder / SETTINGS, cell.made_with)
    if not (cell.folder / TRAINED).is_file():
        before = seconds_before(cell)
        started = time.time()
        write_json(cell.folder / ATTEMPT, {"started": started, "before": before})
        yield script("train_realnet.py", cell, earlier(cell.checkpoints))
        write_json(cell.folder / TRAINED, {"seconds": before + time.time() - started})
    checkpoints = {}
    for choice, names in CHOSEN.items():
        checkpoints[choice] = next(file for file in names if (cell.checkpoints / file).is_file() or file == names[-1])
        options = ["--checkpoint", str(cell.checkpoints / checkpoints[choice]), "--no-pictures", "--gallery", "0"]
        yield script("evaluation_realnet.py", cell, *options, results=choice)
    device = cell.where[cell.where.index("--device") :] if "--device" in cell.where else ()
    options = ["--checkpoint", str(cell.checkpoints / checkpoints["test"]), "--output", str(cell.folder / COST)]
    yield [sys.executable, "-m", "evaluation.cost", *options, *device]
    write_json(cell.folder / RESULT, result_of(cell, checkpoints))


def script(file: str, cell: Cell, *options: str, results: str = "") -> list[str]:
    """The command line of one of our scripts for a cell.

    Args:
        results: subfolder for the evaluation's tables.
    """
    folders = {key: cell.folder / folder for key, folder in FOLDERS.items()}
    folders["results_dir"] /= results
    # In quotes, which are YAML's too: a path may hold a colon or a sharp.
    overrides = [*cell.overrides, *(f"saver.{key}={json.dumps(str(folder))}" for key, folder in folders.items())]
    settings = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, str(REPOSITORY / file), *cell.where, "--class_name", cell.class_name, *settings, *options]


def is_free(folder: Path, say: bool) -> bool:
    """Whether no training runs in a folder: one may have outlived a benchmark that was killed."""
    if not folder.is_dir():
        return True
    try:
        with folder_lock(folder):
            return True
    except UsageError as error:
        if say:
            log.info("waiting: %s", error)
        return False


def earlier(checkpoints: Path) -> str:
    """What the training does with checkpoints of an earlier attempt; the very first saves may have been cut short."""
    can_resume = any((checkpoints / file).is_file() for file in (NEXT, FILES[LAST], PREVIOUS))
    return "--resume" if can_resume or not files_of_run(checkpoints) else "--overwrite"


def seconds_before(cell: Cell) -> float:
    """The training time of attempts that were cut short, up to what they have saved last."""
    attempt, saved = read_json(cell.folder / ATTEMPT), cell.checkpoints / FILES[LAST]
    if attempt is None or not saved.is_file():
        return 0.0
    return attempt["before"] + max(0.0, saved.stat().st_mtime - attempt["started"])


def result_of(cell: Cell, checkpoints: dict[str, str]) -> dict[str, Any]:
    """What the table needs of a cell, and what it was made with."""
    log_file = cell.folder / FOLDERS["log_dir"] / cell.class_name / "train_realnet.jsonl"
    lines = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    metrics = {}
    for choice in CHOSEN:
        table = read_json(cell.folder / FOLDERS["results_dir"] / choice / "metrics.json")
        metrics[choice] = {class_name: row for class_name, row in table.items() if class_name != MEAN}
    peaks = [line["peak_memory_GiB"] for line in lines if line.get("peak_memory_GiB")]
    return {
        "variant": cell.variant,
        "class": cell.class_name,
        "seed": cell.seed,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": code_commit(),
        "torch": torch.__version__,
        "checkpoints": checkpoints,
        "metrics": metrics,
        "cost": {
            **read_json(cell.folder / COST),
            "training_seconds": read_json(cell.folder / TRAINED)["seconds"],
            "peak_memory_GiB": max(peaks) if peaks else None,
        },
        "validation": read_validations(log_file),
        **cell.made_with,
    }


def read_json(path: Path) -> Any:
    """The content of a file of a cell; None if it does not exist."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{path}: is not readable as JSON; delete the folder to make the cell anew") from None


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
