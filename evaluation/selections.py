"""What the choice of a checkpoint is worth: on the test list, as the paper does, against without it."""

from pathlib import Path

from evaluation.results import ClassResult
from evaluation.tables import COLUMNS, Row
from evaluation.trained_model import TrainedModel
from utils.checkpoint import LAST as NEWEST

TEST, SYNTHETIC, LAST = "test", "synthetic", "last"  # values of evaluator.select
FILES = {TEST: "ckpt_best_test.pth.tar", SYNTHETIC: "ckpt_best_synthetic.pth.tar", LAST: NEWEST}
SELECTION_NOTE = (
    "The first row is the paper's protocol: of all validations, the best on the test list. New images have no such "
    "list, so the second row is what to expect. The gap is the first row less the second."
)
SELECTION_TEXTS = {
    TEST: "chosen on test (paper's protocol)",
    SYNTHETIC: "chosen without test (synthetic anomalies)",
    LAST: "chosen without test (last)",
}


def selection_rows(result: ClassResult) -> dict[str, Row]:
    """The metrics of a class by how its checkpoint was chosen, and the gap; {} without another checkpoint."""
    if not result.others:
        return {}
    rows = {result.selection: result.metrics, **result.others}
    ordered = {name: rows[name] for name in (TEST, SYNTHETIC, LAST) if name in rows}
    first, second = ordered.values()
    gap = {name: None if None in (first[name], second[name]) else first[name] - second[name] for name in COLUMNS}
    named = {f"{result.name}: {SELECTION_TEXTS[name]}": row for name, row in ordered.items()}
    return {**named, f"{result.name}: gap": gap}


def selection_of(trained: TrainedModel) -> str:
    """What ckpt_best was selected by: evaluator.select, or the last if too few good images could be held out."""
    select = trained.config.evaluator.select
    return LAST if select == SYNTHETIC and trained.held_out is None else select


def other_selections(checkpoint: Path, select: str) -> dict[str, Path]:
    """What ckpt_best is compared with: the best on the test list, or what was chosen without it; {} without either."""
    names = [TEST] if select != TEST else [SYNTHETIC, LAST]
    found = [name for name in names if (checkpoint.parent / FILES[name]).is_file()]
    return {name: checkpoint.parent / FILES[name] for name in found[:1]}
