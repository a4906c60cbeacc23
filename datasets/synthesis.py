"""Synthetic anomalies in good images: which type, from which source, under which mask."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets.anomaly import augment_texture, blend, grey, is_grey
from datasets.edits import StoredPairs
from datasets.images import Preprocessing, read_mask
from datasets.local_anomalies import LOCAL, OPACITY, visibility
from datasets.perlin import perlin_mask
from datasets.sources import WITHOUT_FOLDER, first_readable, source_images, stored_pairs
from utils.choices import EDIT

DRAWS = 10  # of a local anomaly, until one changes the foreground by at least VISIBLE grey levels
VISIBLE = 3.0


@dataclass(frozen=True)
class SourceFile:
    """A file that an anomaly was made of.

    Args:
        path: of the image.
        state: that of the random generator before the texture was augmented; None for images taken as they are.
    """

    path: Path
    state: dict[str, Any] | None = None

    def read(self, read: Callable[[Path], np.ndarray]) -> np.ndarray:
        """The image, (H,W,3) uint8, augmented as it was, but read by another function, e.g. at another size."""
        image = read(self.path)
        return image if self.state is None else augment_texture(image, _generator(self.state))


@dataclass(frozen=True)
class LocalDraw:
    """How an anomaly was made of good images.

    Args:
        type: a type of local_anomalies.
        state: that of the random generator before.
        scales: of the Perlin noise, for the types that have it.
    """

    type: str
    state: dict[str, Any]
    scales: tuple[int, ...]

    def make(self, image: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and mask, as the type's function returns them, for the same images at another size.

        The generator gives places that are as far from the borders, in shares of the sides.
        """
        return LOCAL[self.type](image, other, _generator(self.state), *self.scales)


@dataclass(frozen=True)
class Anomaly:
    """What is blended into a good image.

    Args:
        type: a name of anomaly_types.
        source: (H,W,3) uint8.
        mask: (H,W) uint8 in {0, 1}, not empty.
        opacity: delta of anomaly.blend.
        file: what the source was read from; None if it was made of good images.
        local: how it was made of good images; None if it was read.
    """

    type: str
    source: np.ndarray
    mask: np.ndarray
    opacity: float
    file: SourceFile | None = None
    local: LocalDraw | None = None

    def blend(self, image: np.ndarray) -> np.ndarray:
        """The good image with the anomaly, (H,W,3) float32 in [0, 255]."""
        return blend(image, self.source, self.mask, self.opacity)


@dataclass(frozen=True)
class GoodFile:
    """Where a good image comes from.

    Args:
        name: its file name in the image list.
        augmented: augments another image and its mask in the same way.
    """

    name: str
    augmented: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Synthesis:
    """How training anomalies are made.

    Args:
        anomaly_types: probability of each of normal, sdas, dtd, edit, and the types of local_anomalies, which need no
            folder.
        sdas_dir: folder of SDAS images; {} stands for the class.
        dtd_dir: folder of textures.
        edit_dir: folder of pairs (edits.read_pairs); {} stands for the class.
        sdas_transparency_range, dtd_transparency_range: (low, high) of the opacity delta.
        min_perlin_scale, perlin_scale: see perlin.perlin_mask.
        match_grey: whether grey images (three equal channels) get grey anomalies.
    """

    anomaly_types: dict[str, float]
    sdas_dir: str | None = None
    dtd_dir: str | None = None
    sdas_transparency_range: Sequence[float] = (0.5, 1.0)
    dtd_transparency_range: Sequence[float] = (0.2, 1.0)
    min_perlin_scale: int = 0
    perlin_scale: int = 6
    match_grey: bool = False
    edit_dir: str | None = None
    sources: dict[str, list[Path]] = field(default_factory=dict, init=False, compare=False)
    pairs: dict[str, StoredPairs] = field(default_factory=dict, init=False, compare=False)

    def open(self, classes: Sequence[str], tell: bool = False) -> None:
        """Find the source images for these classes; those that cannot be read are left out.

        Args:
            tell: whether to log what is left out.

        Raises:
            UsageError: a folder that an anomaly type needs is missing, empty, or holds broken images only.
        """
        if self.anomaly_types.get("dtd"):
            hint = f"put the DTD textures there (data/README.md), or set {WITHOUT_FOLDER}"
            self.sources["dtd"] = source_images(self.dtd_dir, "dtd_dir", hint, tell)
        if self.anomaly_types.get("sdas"):
            hint = f"run sample.py first, or set {WITHOUT_FOLDER}"
            for name in classes:
                folder = self.sdas_dir.replace("{}", name) if self.sdas_dir else None
                self.sources[f"sdas/{name}"] = source_images(folder, "sdas_dir", hint, tell)
        if self.anomaly_types.get(EDIT):
            for name in classes:
                folder = self.edit_dir.replace("{}", name) if self.edit_dir else None
                self.pairs[name] = stored_pairs(folder, tell)
                self.sources[f"{EDIT}/{name}"] = list(self.pairs[name].masks)

    def summaries(self, classes: Collection[str] | None = None) -> dict[str, str]:
        """The number of source images of each kind and a hash of their paths, by which a change is noticed.

        Args:
            classes: whose sources count; None: those of all.
        """
        hashes = {
            kind: hashlib.sha256("\n".join(map(str, paths)).encode("utf-8", "backslashreplace")).hexdigest()[:12]
            for kind, paths in self.sources.items()
            if classes is None or "/" not in kind or kind.partition("/")[2] in classes
        }
        return {kind: f"{len(self.sources[kind])} images, {hashes[kind]}" for kind in sorted(hashes)}

    def draw(
        self,
        image: np.ndarray,
        foreground: np.ndarray,
        clsname: str,
        other: Callable[[], np.ndarray],
        preprocessing: Preprocessing,
        rng: np.random.Generator,
        types: dict[str, float] | None = None,
        good: GoodFile | None = None,
    ) -> Anomaly | None:
        """Draw an anomaly for a good image (RealNet, section 3.1); None if the image stays normal.

        Args:
            image: (H,W,3) uint8.
            foreground: (H,W) uint8 in {0, 1}, where anomalies may lie.
            other: returns another good image of the class, of the same shape; called only where the type needs one.
            types: probabilities that take the place of anomaly_types.
            good: the file that the image was read from, for the type edit.
        """
        chosen = _drawn(self.anomaly_types if types is None else types, rng)
        if chosen == "normal":
            return None
        if chosen == EDIT:
            return self._edit(image, foreground, clsname, preprocessing, rng, good)
        if chosen in LOCAL:
            return self._local(chosen, image, foreground, other, rng)
        source, opacity, file = self.draw_source(chosen, clsname, preprocessing, rng)
        mask = foreground * perlin_mask(*image.shape[:2], rng, self.min_perlin_scale, self.perlin_scale)
        return Anomaly(chosen, self.matched(source, image), mask, opacity, file) if mask.any() else None

    def matched(self, source: np.ndarray, image: np.ndarray) -> np.ndarray:
        """The source, grey where the image is grey and match_grey asks for it."""
        return grey(source) if self.match_grey and is_grey(image) else source

    def _local(
        self,
        chosen: str,
        image: np.ndarray,
        foreground: np.ndarray,
        other: Callable[[], np.ndarray],
        rng: np.random.Generator,
    ) -> Anomaly | None:
        """Draw an anomaly of a type of local_anomalies; None if DRAWS do not show."""
        second = other() if chosen == "cutpaste" else image
        scales = (self.min_perlin_scale, self.perlin_scale) if chosen == "self" else ()
        for _ in range(DRAWS):
            draw = LocalDraw(chosen, rng.bit_generator.state, scales)
            source, mask = LOCAL[chosen](image, second, rng, *scales)
            mask, opacity = mask * foreground, float(rng.uniform(*OPACITY[chosen]))
            if mask.any() and visibility(image, source, mask, opacity) >= VISIBLE:
                return Anomaly(chosen, self.matched(source, image), mask, opacity, local=draw)
        return None

    def _edit(
        self,
        image: np.ndarray,
        foreground: np.ndarray,
        clsname: str,
        preprocessing: Preprocessing,
        rng: np.random.Generator,
        good: GoodFile | None,
    ) -> Anomaly | None:
        """Draw a stored pair: of this image if there is one, else the changed region of another one, blended in."""
        pairs = self.pairs[clsname]
        own = pairs.made_of(good.name) if good else []
        paths = own or list(pairs.masks)

        def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
            return preprocessing.read(path), read_mask(pairs.masks[path], preprocessing.size)

        path, (source, mask) = first_readable(paths, int(rng.integers(len(paths))), read)
        source, mask = good.augmented(source, mask) if own else (source, mask * foreground)
        return Anomaly(EDIT, self.matched(source, image), mask, 1.0, SourceFile(path)) if mask.any() else None

    def draw_source(
        self, chosen: str, clsname: str, preprocessing: Preprocessing, rng: np.random.Generator
    ) -> tuple[np.ndarray, float, SourceFile]:
        """Draw an image of a folder, (H,W,3) uint8, its opacity, and its file."""
        paths = self.sources["dtd" if chosen == "dtd" else f"sdas/{clsname}"]
        index = int(rng.integers(len(paths)))
        path, source = first_readable(paths, index, preprocessing.read)
        if chosen == "sdas":
            return source, float(rng.uniform(*self.sdas_transparency_range)), SourceFile(path)
        file = SourceFile(path, rng.bit_generator.state)
        return augment_texture(source, rng), float(rng.uniform(*self.dtd_transparency_range)), file


def _generator(state: dict[str, Any]) -> np.random.Generator:
    """A random generator in a state that another one had."""
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    return rng


def _drawn(types: dict[str, float], rng: np.random.Generator) -> str:
    """One of the types, with their probabilities."""
    names = list(types)
    # numpy wants a sum of 1 to 1.5e-8; settings may be rounded to 1e-6.
    probabilities = np.array(list(types.values())) / sum(types.values())
    return names[int(rng.choice(len(names), p=probabilities))]
