"""The four benchmarks and DTD: names, classes, image counts, folder layouts, foreground rules."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ForegroundRule:
    """How to separate the object from its background.

    Args:
        channel: "gray", "red", "green" or "blue".
        threshold: "otsu", "triangle" or a value 0 .. 255.
        invert: the object is at or below the threshold instead of above it.
        close, open: sides in pixels of the squares for morphological closing, then opening; 0 skips the step.
    """

    channel: str = "gray"
    threshold: str | int = "otsu"
    invert: bool = False
    close: int = 0
    open: int = 0


@dataclass(frozen=True)
class DatasetInfo:
    """One benchmark data set.

    Args:
        type: its name in a YAML's dataset.type, and the name of its image folder under data/<name>/.
        counts: number of (training, test) images by class, in the order of the class numbers.
        foreground: rule by class; without one, the whole image is foreground.
        layout: the official folders, in words.
        paper: the paper's mean results, by metric.
    """

    type: str
    counts: dict[str, tuple[int, int]]
    foreground: dict[str, ForegroundRule] = field(default_factory=dict)
    layout: str = "C/train/good, C/test/D, C/ground_truth/D/S_mask.png"
    paper: dict[str, float] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the class numbers."""
        return tuple(self.counts)


@dataclass(frozen=True)
class TexturesInfo:
    """A collection of textures for the anomaly type dtd.

    Args:
        type: name of its image folder under data/<name>/.
        folders, images: number of each.
    """

    type: str
    folders: int
    images: int


def _rules(classes: str, **rule: object) -> dict[str, ForegroundRule]:
    return {name: ForegroundRule(**rule) for name in classes.split()}


CATALOG = {
    "MVTec-AD": DatasetInfo(
        "mvtec",
        {
            "bottle": (209, 83),
            "cable": (224, 150),
            "capsule": (219, 132),
            "carpet": (280, 117),
            "grid": (264, 78),
            "hazelnut": (391, 110),
            "leather": (245, 124),
            "metal_nut": (220, 115),
            "pill": (267, 167),
            "screw": (320, 160),
            "tile": (230, 117),
            "toothbrush": (60, 42),
            "transistor": (213, 100),
            "wood": (247, 79),
            "zipper": (240, 151),
        },
        {
            **_rules("pill", close=6, open=6),
            **_rules("hazelnut metal_nut toothbrush", threshold="triangle", close=6, open=6),
            **_rules("bottle capsule grid screw zipper", invert=True, close=6, open=6),
        },
        paper={"image_auroc": 0.9965, "pixel_auroc": 0.9903, "pro": 0.9307},
    ),
    "VisA": DatasetInfo(
        "visa",
        {
            "candle": (900, 200),
            "capsules": (542, 160),
            "cashew": (450, 150),
            "chewinggum": (453, 150),
            "fryum": (450, 150),
            "macaroni1": (900, 200),
            "macaroni2": (900, 200),
            "pcb1": (904, 200),
            "pcb2": (901, 200),
            "pcb3": (905, 201),
            "pcb4": (904, 201),
            "pipe_fryum": (450, 150),
        },
        {
            **_rules("pcb1 pcb2 pcb3 pcb4", channel="blue", threshold="triangle", close=8, open=3),
            **_rules("candle cashew chewinggum fryum macaroni1 macaroni2 pipe_fryum", close=3, open=3),
        },
        "C/Data/Images/{Normal,Anomaly}, C/Data/Masks/Anomaly and split_csv/1cls.csv; or C/train/ok, C/test/{ok,ko}, "
        "C/ground_truth/ko/S.png",
        {"image_auroc": 0.978, "pixel_auroc": 0.988},
    ),
    "MPDD": DatasetInfo(
        "mpdd",
        {
            "bracket_black": (289, 79),
            "bracket_brown": (185, 77),
            "bracket_white": (110, 60),
            "connector": (128, 44),
            "metal_plate": (54, 97),
            "tubes": (122, 101),
        },
        {
            **_rules("bracket_black bracket_brown connector", channel="green", invert=True, close=6),
            **_rules("bracket_white tubes", channel="blue", close=6),
            **_rules("metal_plate", invert=True, close=6),
        },
        paper={"image_auroc": 0.963, "pixel_auroc": 0.982},
    ),
    "BTAD": DatasetInfo(
        "btad",
        {"01": (400, 70), "02": (399, 230), "03": (1000, 441)},
        _rules("01 03", close=15, open=6),
        "C/train/ok, C/test/{ok,ko}, C/ground_truth/ko/S.{png,bmp}",
        {"image_auroc": 0.961, "pixel_auroc": 0.979},
    ),
}
TEXTURES = {"DTD": TexturesInfo("images", 47, 5640)}


def find(dataset: str) -> DatasetInfo | None:
    """Look up a data set by name ("MVTec-AD") or type ("mvtec"); None if unknown."""
    for name, info in CATALOG.items():
        if dataset in (name, info.type):
            return info
    return None


def known_classes(dataset: str | None) -> tuple[str, ...]:
    """The classes of a data set of the catalogue; empty for one's own."""
    info = find(dataset or "")
    return tuple(info.classes) if info else ()
