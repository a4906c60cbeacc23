"""Mutants of the four settings files, and a table of which of them may be accepted. For benchmarks/mutants.py."""

import copy
import datetime
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.attacks.values import OPTIMIZERS, REALNET, SAMPLING, SDAS, TRAINING
from tests.conftest import settings
from utils.config import load_config, plain

STAGES = ("diffusion", "classifier", "sample", "realnet")
HUGE = 10**400

# What is put in place of any value: by label.
VALUES: dict[str, Any] = {
    "null": None, "True": True, "False": False, "'False'": "False", "'no'": "no", "'yes'": "yes", "empty text": "",
    "text": "many", "zero": 0, "one": 1, "minus one": -1, "fraction": 1.5, "share": 0.25, "nan": math.nan,
    "inf": math.inf, "minus inf": -math.inf, "minus zero": -0.0, "1e308": 1e308, "smallest": 5e-324, "1e12": 10**12,
    "400 digits": HUGE, "minus 400 digits": -HUGE, "empty list": [], "empty map": {}, "300 letters": "x" * 300,
    "NUL": "a\0b", "surrogate": "\ud800", "escape": "\x1b[2Jx", "outside": "../../x", "bytes": b"\0\xff",
    "date": datetime.date(2020, 1, 1), "list of null": [None], "list of text": ["a", "b"],
    "list of nan": [math.nan] * 2, "list of bool": [True, False], "map of itself": {"a": {"a": {}}},
}  # fmt: skip
# Made from the value itself.
DERIVED = {
    "nested": lambda value: [[value]],
    "twice": lambda value: [value, value],
    "in a map": lambda value: {"value": value},
    "as text": str,
}


@dataclass(frozen=True)
class Mutant:
    """Changed settings.

    Args:
        stage: of which file.
        path: of the changed value.
        label: what was done to it.
        key: the text that a refusal has to hold.
        config: the changed settings.
        allowed: whether accepting them is right; None: see legitimate.
    """

    stage: str
    path: tuple
    label: str
    key: str
    config: dict
    value: Any = None
    before: Any = None
    allowed: bool | None = None

    @property
    def name(self) -> str:
        return f"{self.stage}: {'.'.join(map(str, self.path))} {self.label}"


def full_settings(folder: Path) -> dict[str, dict]:
    """Good settings of each stage with every key given, so that all can be changed; run it in the workspace.

    Args:
        folder: for files on the way.
    """
    import yaml

    full = {}
    for stage, config in settings("data/tiny", "experiments/tiny").items():
        path = folder / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(config))
        full[stage] = copy.deepcopy(plain(load_config(path, (), stage)))
    optimizer = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    for stage in ("diffusion", "classifier", "realnet"):
        full[stage]["trainer"]["optimizer"]["kwargs"] = dict(optimizer)
    net = {part["name"]: part["kwargs"] for part in full["realnet"]["net"]}
    net["backbone"].update(standardize=False)
    net["rrs"].update(modes=["max", "mean"], stop_grad=False)
    full["realnet"]["criterion"] = [
        {"name": "focal", "type": "SegmentFocalLoss", "kwargs": {"weight": 1.0, "gamma": 2.0, "alpha": 0.5,
                                                                 "balance_index": 0}},
        {"name": "FeatureMSELoss", "type": "FeatureMSELoss", "kwargs": {"weight": 1.0}},
    ]  # fmt: skip
    full["realnet"]["dataset"]["foreground"] = {
        "channel": "gray",
        "threshold": "otsu",
        "invert": False,
        "close": 3,
        "open": 3,
    }
    full["diffusion"]["criterion"] = [{"name": "m", "type": "ImageMSELoss", "kwargs": {"weight": 1.0}}]
    return full


def _nodes(node: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every value, section and list entry with its path, outermost first."""
    if path:
        yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield from _nodes(value, (*path, key))


def at(config: Any, path: tuple) -> Any:
    for part in path:
        config = config[part]
    return config


def _key(path: tuple) -> str:
    return next((part for part in reversed(path) if isinstance(part, str)), "")


def mutants(folder: Path, count: int, seed: int) -> list[Mutant]:
    """The special mutants, and random ones of the generic kinds up to `count`."""
    full = full_settings(folder)
    found = [mutant for stage in STAGES for mutant in _generic(stage, full[stage])]
    random.Random(seed).shuffle(found)
    # Were the good settings refused, every mutant would be.
    good = [Mutant(stage, (), "unchanged", "", full[stage], allowed=True) for stage in STAGES]
    special = good + [mutant for stage in STAGES for mutant in _special(stage, full[stage])]
    return special + found[: max(0, count - len(special))]


def _generic(stage: str, good: dict) -> Iterator[Mutant]:
    for path, value in _nodes(good):
        key = _key(path)
        for label, wrong in [*VALUES.items(), *((label, make(value)) for label, make in DERIVED.items())]:
            yield _changed(stage, good, path, wrong, label, key)
        if isinstance(path[-1], str):
            for label, name in _misspelt(key):
                config = copy.deepcopy(good)
                at(config, path[:-1])[name] = at(config, path[:-1]).pop(key)
                yield Mutant(stage, path, f"misspelt {label}", name, config, value, value)
        config = copy.deepcopy(good)
        del at(config, path[:-1])[path[-1]]
        yield Mutant(stage, path, "missing", key, config, None, value)
        if isinstance(value, dict):
            config = copy.deepcopy(good)
            at(config, path)["zzz"] = 1
            yield Mutant(stage, (*path, "zzz"), "unknown key", "zzz", config, 1)
        if isinstance(value, list) and value:
            config = copy.deepcopy(good)
            at(config, path).append(copy.deepcopy(value[0]))
            yield Mutant(stage, path, "entry given twice", key, config, at(config, path), value)


def _misspelt(key: str) -> list[tuple[str, str]]:
    swapped = key[0] + key[2:3] + key[1:2] + key[3:] if len(key) > 2 else f"{key}{key}"
    spellings = [("longer", f"{key}x"), ("upper", key.upper()), ("swapped", swapped), ("blank", f" {key}")]
    return [(label, name) for label, name in spellings if name != key]


def _changed(
    stage: str, good: dict, path: tuple, value: Any, label: str, key: str = "", allowed: bool | None = None
) -> Mutant:
    config = copy.deepcopy(good)
    before = at(config, path[:-1])[path[-1]] if _has(config, path) else None
    at(config, path[:-1])[path[-1]] = copy.deepcopy(value)
    return Mutant(stage, path, label, key or _key(path), config, value, before, allowed)


def _has(config: Any, path: tuple) -> bool:
    try:
        at(config, path)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _special(stage: str, good: dict) -> Iterator[Mutant]:
    own = {"diffusion": TRAINING + SDAS, "classifier": TRAINING + SDAS, "realnet": TRAINING + REALNET}
    for path, value, allowed in own.get(stage, SAMPLING):
        if _has(good, path[:-1]):
            yield _changed(stage, good, path, value, f"= {str(value)[:40]!r}", allowed=allowed)
    section = {"diffusion": "unet", "classifier": "classifier", "sample": "unet"}.get(stage)
    if section:
        for key in ("class_number", "classifier_width", "classifier_depth", "num_head_channels"):
            yield _changed(stage, good, (section, key), 10**12, "= 10**12", allowed=False)
        yield _changed(stage, good, (section, "channel_mult"), [1, 10**12], "= 10**12", allowed=False)
    if stage != "sample":
        for name in OPTIMIZERS:
            config = copy.deepcopy(good)
            config["trainer"]["optimizer"] = {"type": name, "kwargs": {"lr": 1e-3}}
            # LBFGS needs a closure, SparseAdam sparse gradients, Muon matrices.
            allowed = name not in ("LBFGS", "SparseAdam", "Muon")
            yield Mutant(
                stage, ("trainer", "optimizer", "type"), f"= {name!r}", "optimizer", config, name, "Adam", allowed
            )
    if stage == "realnet":
        for i, part in enumerate(good["net"]):
            config = copy.deepcopy(good)
            config["net"].append(copy.deepcopy(part))
            yield Mutant(stage, ("net", i), f"{part['name']} twice", "net", config, part, part, False)


# ---- what may be accepted --------------------------------------------------------------------------------------------

FREE_TEXT = {
    "checkpoints_dir", "log_dir", "vis_dir", "results_dir", "root", "version", "type", "name", "pertrain_path",
    "pretrain_path", "image_dir",
}  # fmt: skip
NULLABLE = {
    "version", "foreground", "bits", "pixel_mean", "pixel_std", "pertrain_path", "pretrain_path", "clip_max_norm",
    "ema_decay", "classes", "H", "W", "sdas_dir", "alpha", "kwargs", "meta_file", "class_number", "classifier",
}  # fmt: skip
# Kinds that stand for a null in the full settings.
OF_NULL = {
    "bits": int, "ema_decay": float, "clip_max_norm": float, "pixel_mean": list, "pixel_std": list, "classes": list,
    "alpha": float, "meta_file": str, "sdas_dir": str, "version": str, "pretrain_path": str, "pertrain_path": str,
    "dtd_dir": str, "backbone": str, "layers": list,
}  # fmt: skip
ANY_SIZE = {
    "max_epoch", "sample_number", "max_bad_steps", "keep", "keep_pictures", "max_megapixels", "cache_mb",
    "val_batch_number", "init_bsn",
}  # fmt: skip
UNUSED = {"criterion"}  # legacy in classifier.yaml
REQUIRED_PARTS = {"name", "type", "idx", "planes", "stride", "layers"}


def legitimate(mutant: Mutant) -> bool:
    """Whether it is right to accept a mutant, e.g. because it is another valid number."""
    if mutant.allowed is not None:
        return mutant.allowed
    key, value, before = mutant.key, mutant.value, mutant.before
    unchanged = type(value) is type(before) and value == before and not mutant.label.startswith(("misspelt", "unknown"))
    if unchanged or (value is None and isinstance(before, dict) and not any(isinstance(p, int) for p in mutant.path)):
        return True  # a section of null has its defaults
    top = mutant.path[0]
    if mutant.label.startswith("misspelt") or mutant.label == "unknown key":
        return False
    if mutant.label == "missing":
        in_list = any(isinstance(part, int) for part in mutant.path)
        return not (in_list and isinstance(mutant.path[-1], str) and key in REQUIRED_PARTS) or top in UNUSED
    if mutant.label == "entry given twice":
        return not isinstance(before[0], (dict, str))
    return fits(key, value, before)


def fits(key: str, value: Any, before: Any) -> bool:
    """Whether a value may stand in place of another one."""
    if value is None:
        return before is None or key in NULLABLE
    wanted = OF_NULL.get(key, type(before)) if before is None else type(before)
    if wanted is float and type(value) is int:
        wanted = int
    if wanted is dict and value == {}:
        return True
    if type(value) is not wanted:
        return key == "amp" and value is False
    if wanted is int:
        return 0 <= value <= (10**12 if key.endswith(("_step", "_epoch")) or key in ANY_SIZE else 10**6)
    if wanted is float:
        return math.isfinite(value) and abs(value) <= 1e6
    if wanted is str:
        return key in FREE_TEXT and value.isprintable() and 0 < len(value) <= 255
    if wanted is list and before:
        return bool(value) and all(fits(key, entry, before[0]) for entry in value)
    return True
