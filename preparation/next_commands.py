"""The commands that follow prepare_data.py."""

import shlex
from pathlib import Path

from datasets.lists import listed_classes
from datasets.sources import OF_GOOD_IMAGES, WITH_TEXTURES
from utils import cli
from utils.config import load_config
from utils.errors import UsageError

OF_BENCHMARKS = {"normal": 0.5, "sdas": 0.5}  # anomaly types


def next_commands(dataset: str, lists: Path, previewed: bool) -> str:
    """The commands that train and evaluate, or predict where there is nothing to evaluate on, one a line.

    Args:
        dataset: name of the data set.
        lists: folder of its image lists.
        previewed: whether the sheets of what training will see have been written.
    """
    classes = listed_classes(str(lists / "train_{}.json"))
    chosen = "all" if len(classes) > 1 else shlex.quote(classes[0])
    train = f"train_realnet.py --dataset {dataset} --class_name {chosen}"
    if any(map(_holds_lines, lists.glob("test_*.json"))):
        evaluate = f"evaluation_realnet.py --dataset {dataset} --class_name {chosen}"
    else:
        evaluate = cli.predict_command(f"experiments/{dataset}/realnet_checkpoints/{classes[0]}")
    types = _anomaly_types_of(Path("experiments") / dataset / "realnet.yaml")
    shares = {"cutpaste": OF_GOOD_IMAGES, "dtd": WITH_TEXTURES, "sdas": "{normal: 0.5, sdas: 0.5}"}
    quick, with_textures, with_diffusion = (
        "" if types.get(kind) else f' --set "dataset.train.anomaly_types={share}"' for kind, share in shares.items()
    )
    classifier = f"train_classifier.py --dataset {dataset}    # optional: else sample.py --no-classifier"
    diffusion = [f"train_diffusion.py --dataset {dataset}", *[classifier] * (len(classes) > 1)]
    blocks = {
        "Next:": [f"prepare_data.py --dataset {dataset} --preview    # what training will see"] * (not previewed),
        "The quick way:": [f"{train}{quick}", evaluate],
        "Or with textures too (DTD, or any folder of images as dataset.train.dtd_dir):": (
            [f"{train}{with_textures}", evaluate] if with_textures else []
        ),
        "Or with the anomalies of a diffusion model:": [
            *diffusion,
            f"sample.py --dataset {dataset}",
            f"{train}{with_diffusion}",
            evaluate,
        ],
    }
    lines = []
    for heading, commands in blocks.items():
        lines += [heading, *(f"  python {command}" for command in commands)] if commands else []
    return "\n".join(lines)


def _anomaly_types_of(path: Path) -> dict[str, float]:
    """The anomaly types of a realnet.yaml; those of the benchmarks if it is missing or cannot be used."""
    try:
        return load_config(path, script="realnet").dataset.train.anomaly_types
    except UsageError:
        return OF_BENCHMARKS


def _holds_lines(path: Path) -> bool:
    """Whether an image list is not empty."""
    return path.stat().st_size > 0
