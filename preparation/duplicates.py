"""Reports images that are nearly the same: test images as a training image, or most training images."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from datasets.lists import Sample
from datasets.splits import Fingerprint, duplicate_groups, near_duplicates
from preparation.findings import CHECK, LEAK, Finding
from utils.counts import counted


def report_leaks(
    train: Iterable[Sample],
    test: Iterable[Sample],
    fingerprints: Mapping[str, Fingerprint],
    parts: Mapping[str, str] = MappingProxyType({}),
) -> list[Finding]:
    """Findings for test images that are nearly the same as a training image of their class, or show the same part.

    Args:
        parts: the part that an image shows, by file name, as far as it is known.
    """
    train, test = list(train), list(test)
    findings = []
    for name in sorted({sample.clsname for sample in train}):
        train_files = [sample.filename for sample in train if sample.clsname == name]
        test_files = [sample.filename for sample in test if sample.clsname == name]
        similar_to: dict[int, list[int]] = {}
        pairs = near_duplicates([fingerprints[f] for f in train_files], [fingerprints[f] for f in test_files])
        for i, j in pairs:
            similar_to.setdefault(j, []).append(i)
        for j, similar in similar_to.items():
            more = f" and {len(similar) - 1} more" if len(similar) > 1 else ""
            text = f"is nearly the same as the training image {train_files[similar[0]]}{more}"
            findings.append(Finding(LEAK, test_files[j], text))
        trained = {parts[file]: file for file in reversed(train_files) if file in parts}
        for j, file in enumerate(test_files):
            if j not in similar_to and parts.get(file) in trained:
                text = f"shows the same part ({parts[file]}) as the training image {trained[parts[file]]}"
                findings.append(Finding(LEAK, file, text))
    return findings


def report_repeats(
    train: Iterable[Sample], fingerprints: Mapping[str, Fingerprint], parts: Mapping[str, str]
) -> list[Finding]:
    """Findings for classes most of whose training images are nearly the same as others; none where parts are named."""
    train, findings = list(train), []
    for name in sorted({sample.clsname for sample in train}):
        files = [sample.filename for sample in train if sample.clsname == name]
        groups = duplicate_groups([fingerprints[file] for file in files])
        if len(groups) <= len(files) / 2 and not parts:
            largest = max(groups, key=len)
            distinct = counted(len(groups), "distinct one")
            example = " and ".join(files[index] for index in largest[:2])
            text = (
                f"its {len(files)} training images are {distinct} and copies, such as {example}; copies teach nothing"
            )
            text += ", but the threshold counts each of them"
            findings.append(Finding(CHECK, name, text))
    return findings
