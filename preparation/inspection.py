"""Opens every image and mask once, to find sizes, unreadable files, unusual values, and masks that do not fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.anomaly import is_grey
from datasets.images import (
    count_pages,
    is_deep_colour,
    open_image,
    pixels_of,
    read_image,
    read_mask,
    same_aspect_ratio,
)
from datasets.lists import Sample
from datasets.splits import Fingerprint, fingerprint
from preparation.findings import CHECK, NO_MASK, UNREADABLE, Finding
from utils.counts import counted
from utils.distributed import usable_cores
from utils.errors import UsageError
from utils.prefetch import prefetch

CAMERA_BITS = (8, 10, 12, 14)  # of cameras that write 16-bit files
_SOFT_VALUES = 4  # A mask with more grey values than this is soft; class numbers are fewer, and small.


@dataclass(frozen=True)
class ImageInfo:
    """What inspection measures on an image.

    Args:
        size: (height, width) of the upright image.
        fingerprint: to find near-duplicates by.
        largest: the largest value of a 16-bit image; None for others.
        grey: whether the three channels are equal.
    """

    size: tuple[int, int]
    fingerprint: Fingerprint
    largest: int | None = None
    grey: bool = False


def inspect(root: Path, samples: Sequence[Sample]) -> tuple[dict[str, ImageInfo], list[Sample], list[Finding]]:
    """Decode all images and masks.

    Returns:
        ImageInfo by file name; the readable samples, without unusable masks; findings.
    """
    infos, readable, findings = {}, [], []
    results = prefetch(
        lambda sample: _inspect_one(root, sample),
        samples,
        2 * usable_cores(),
        lambda sample: pixels_of(root / sample.filename),
    )
    # disable=None hides the bar if there is no terminal.
    for sample, info, problems in tqdm(results, "reading images", len(samples), leave=False, disable=None):
        findings += problems
        if info is not None:
            readable.append(sample)
            infos[sample.filename] = info
    return infos, readable, findings


def report_bits(samples: Sequence[Sample], infos: dict[str, ImageInfo]) -> list[Finding]:
    """Findings for classes whose 16-bit images are filled to 12 bits, say: they would come out nearly black."""
    findings = []
    for name in sorted({sample.clsname for sample in samples}):
        largest = [infos[sample.filename].largest for sample in samples if sample.clsname == name]
        deep = [value for value in largest if value is not None]
        bits = next((bits for bits in CAMERA_BITS if deep and max(deep) < 1 << bits), None)
        if bits is not None:
            values = f"no value above {max(deep)}, so"
            images = counted(
                len(deep),
                f"16-bit image holds {values} it has {bits} bits and comes out dark",
                f"16-bit images hold {values} they have {bits} bits and come out dark",
            )
            text = f"its {images}; set dataset.image_reader.kwargs.bits: {bits} in the YAML files"
            findings.append(Finding(CHECK, name, text))
    return findings


def _inspect_one(root: Path, sample: Sample) -> tuple[Sample, ImageInfo | None, list[Finding]]:
    try:
        image = read_image(root / sample.filename)
    except UsageError as error:
        return sample, None, [Finding(UNREADABLE, sample.filename, _reason(error, root / sample.filename))]
    size = image.shape[:2]
    unusable = _mask_problem(root, sample, size)
    problems = [unusable] if unusable else _mask_doubts(root, sample)
    pages = count_pages(root / sample.filename)
    if pages > 1:
        problems.append(Finding(CHECK, sample.filename, f"has {pages} pages, of which only the first is used"))
    if image.min() == image.max():
        problems.append(Finding(CHECK, sample.filename, "has one colour all over; was the camera covered?"))
    if unusable:
        sample = replace(sample, maskname=None)
    return (
        sample,
        ImageInfo(size, fingerprint(image), _largest(root / sample.filename, image), is_grey(image)),
        problems,
    )


def _largest(path: Path, image: np.ndarray) -> int | None:
    """The largest value of a 16-bit image; of a colour image, which Pillow decodes to 8 bits, its upper 8 bits."""
    with open_image(path) as opened:
        if is_deep_colour(opened):
            return int(image.max()) << 8 | 0xFF
        return int(np.asarray(opened).max()) if opened.mode.startswith("I") else None


def _mask_problem(root: Path, sample: Sample, size: tuple[int, int]) -> Finding | None:
    """Why an image's mask cannot be used, or None."""
    if sample.maskname is None:
        return None
    try:
        mask = read_mask(root / sample.maskname)
    except UsageError as error:
        return Finding(UNREADABLE, sample.maskname, f"mask {_reason(error, root / sample.maskname)}")
    # A mask with the image's aspect ratio is scaled when used; with a different one, it belongs to another image.
    if not same_aspect_ratio(mask.shape, size):
        (h, w), (height, width) = mask.shape, size
        text = f"mask is {w}x{h} pixels, but the image is {width}x{height}; the mask is ignored"
        return Finding(NO_MASK, sample.maskname, text)
    if not mask.any():
        return Finding(NO_MASK, sample.maskname, "mask is empty although the image is defective; the mask is ignored")
    return None


def _mask_doubts(root: Path, sample: Sample) -> list[Finding]:
    """What looks wrong in a mask that is used all the same."""
    if sample.maskname is None:
        return []
    path = root / sample.maskname
    doubts, share = [], float(read_mask(path).mean())
    if share == 1:
        doubts.append("mask is white all over: the whole image counts as defective")
    elif share > 0.5:
        doubts.append(
            f"mask marks {min(round(100 * share), 99)}% of the image; if it is inverted, white has to be the defect"
        )
    between = _values_between(path)
    if between > _SOFT_VALUES:
        doubts.append(
            f"mask has soft edges ({between} grey values): all above 0 count as defective, so save it as 0 / 255"
        )
    return [Finding(CHECK, sample.maskname, text) for text in doubts]


def _values_between(path: Path) -> int:
    """Number of grey values between black and white in a mask. In a JPEG they come from compression."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return 0
    with open_image(path) as opened:
        values = np.unique(
            np.asarray(opened if opened.mode in ("L", "F") or opened.mode[0] == "I" else opened.convert("L"))
        )
    # VisA's masks hold the numbers of defects instead of white.
    return int(np.sum((values > 0) & (values < values.max()))) if values.max() > 127 else 0


def _reason(error: UsageError, path: Path) -> str:
    """The error's message without the leading path."""
    return str(error).removeprefix(str(path)).strip()
