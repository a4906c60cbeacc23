"""Findings about the user's images, and their report."""

import logging
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets.lists import Sample
from utils.counts import counted
from utils.files import write_text

log = logging.getLogger("realnet")

# Kinds of findings, in the order of the report.
MISSING, SURPLUS, UNREADABLE, NO_MASK, AMBIGUOUS, CHECK, LEAK = (
    "missing",
    "surplus",
    "unreadable",
    "without a mask",
    "ambiguous",
    "to check",
    "on both sides of the split",
)
KINDS = (MISSING, SURPLUS, UNREADABLE, NO_MASK, AMBIGUOUS, CHECK, LEAK)
SHOWN = 10  # findings of each kind printed on the terminal
SHOWN_LEAKS = 3  # There may be as many as test images.


@dataclass(frozen=True)
class Finding:
    """One thing that the owner of the images should know.

    Args:
        kind: one of KINDS.
        where: file, folder or class.
        text: what is wrong.
    """

    kind: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def report(findings: list[Finding], path: Path) -> bool:
    """Print the first findings of each kind and write all of them to `path`; return whether any file is unreadable.

    Both are in the order of KINDS, so that leaks, of which there may be many, come last.
    """
    findings = sorted(findings, key=lambda finding: KINDS.index(finding.kind))
    write_text(path, "".join(f"{finding.kind}: {finding}\n" for finding in findings))
    counts = Counter(finding.kind for finding in findings)
    for kind in KINDS:
        of_kind = [finding for finding in findings if finding.kind == kind]
        shown = SHOWN_LEAKS if kind == LEAK else SHOWN
        for finding in of_kind[:shown]:
            print(f"{kind}: {finding}", file=sys.stderr if kind == UNREADABLE else sys.stdout)
        if len(of_kind) > shown:
            print(f"{kind}: and {len(of_kind) - shown} more, see {path}")
    total = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
    log.info("findings: %s", f"{total} ({path})" if total else "none")
    return counts[UNREADABLE] > 0


def report_too_few(train: list[Sample]) -> list[Finding]:
    """Findings for classes with a single training image."""
    counts = Counter(sample.clsname for sample in train)
    text = "has one training image; a model of good parts needs dozens"
    return [Finding(CHECK, name, text) for name, count in counts.items() if count == 1]


def report_unnamed(samples: list[Sample], parts: dict[str, str]) -> list[Finding]:
    """A finding for images that --parts does not name, though it names others."""
    unnamed = [sample.filename for sample in samples if sample.filename not in parts]
    if not parts or not unnamed:
        return []
    named = f"names the part of {len(samples) - len(unnamed)} of {counted(len(samples), 'image')}"
    text = f"{named}; each other counts as a part of its own"
    return [Finding(CHECK, "--parts", f"{text}: {', '.join(unnamed[:3])}{', ...' * (len(unnamed) > 3)}")]
