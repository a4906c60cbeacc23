"""What is known of each data set: classes, layout, foreground rule. The only place that knows names."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ForegroundRule:
    """How to tell the object from its background.

    Args:
        channel: "gray", "red", "green" or "blue".
        threshold: "otsu", "triangle" or a value 0 .. 255.
        invert: the object is at or below the threshold instead of above.
        close, open: sides of the squares of the two morphological steps, close first; 0 leaves a step out.
    """

    channel: str = "gray"
    threshold: str | int = "otsu"
    invert: bool = False
    close: int = 0
    open: int = 0


@dataclass(frozen=True)
class DatasetInfo:
    """One data set of the field.

    Args:
        type: its name in a YAML's dataset.type, and of its folder.
        classes: in the order of the class numbers.
        foreground: rule of each class; a class without one is all foreground.
    """

    type: str
    classes: tuple[str, ...]
    foreground: dict[str, ForegroundRule] = field(default_factory=dict)


def _rules(classes: str, **rule: object) -> dict[str, ForegroundRule]:
    return {name: ForegroundRule(**rule) for name in classes.split()}


CATALOG = {
    "MVTec-AD": DatasetInfo(
        "mvtec",
        (
            "bottle",
            "cable",
            "capsule",
            "carpet",
            "grid",
            "hazelnut",
            "leather",
            "metal_nut",
            "pill",
            "screw",
            "tile",
            "toothbrush",
            "transistor",
            "wood",
            "zipper",
        ),
        {
            **_rules("pill", close=6, open=6),
            **_rules("hazelnut metal_nut toothbrush", threshold="triangle", close=6, open=6),
            **_rules("bottle capsule grid screw zipper", invert=True, close=6, open=6),
        },
    ),
    "VisA": DatasetInfo(
        "visa",
        (
            "candle",
            "capsules",
            "cashew",
            "chewinggum",
            "fryum",
            "macaroni1",
            "macaroni2",
            "pcb1",
            "pcb2",
            "pcb3",
            "pcb4",
            "pipe_fryum",
        ),
        {
            **_rules("pcb1 pcb2 pcb3 pcb4", channel="blue", threshold="triangle", close=8, open=3),
            **_rules("candle cashew chewinggum fryum macaroni1 macaroni2 pipe_fryum", close=3, open=3),
        },
    ),
    "MPDD": DatasetInfo(
        "mpdd",
        (
            "bracket_black",
            "bracket_brown",
            "bracket_white",
            "connector",
            "metal_plate",
            "tubes",
        ),
        {
            **_rules("bracket_black bracket_brown connector", channel="green", invert=True, close=6),
            **_rules("bracket_white tubes", channel="blue", close=6),
            **_rules("metal_plate", invert=True, close=6),
        },
    ),
    "BTAD": DatasetInfo("btad", ("01", "02", "03"), _rules("01 03", close=15, open=6)),
}


def find(dataset: str) -> DatasetInfo | None:
    """A data set by its name ("MVTec-AD") or type ("mvtec"); None for others."""
    for name, info in CATALOG.items():
        if dataset in (name, info.type):
            return info
    return None
