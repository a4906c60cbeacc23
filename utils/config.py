"""The YAML settings: one table of every key with its type and default, and a loader that checks files against it."""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from utils.errors import RunError, UsageError

_MISSING = object()


@dataclass(frozen=True)
class Setting:
    """One key: its type, its default where it may be left out, and what its numbers are confined to.

    `kind` is int, float, bool, str, ints, floats, list, map or any; a "?" behind it admits null. `low` and `high` bound
    numbers, also those in a list; `length` is that of a list.
    """

    kind: str
    default: Any = _MISSING
    low: float | None = None
    high: float | None = None
    length: int | None = None


@dataclass(frozen=True)
class Section:
    """A group of keys; an optional one may be null or left out and is then null."""

    keys: dict[str, Any]
    optional: bool = False


# ---- every setting ---------------------------------------------------------------------------------------------------

_READER = Section(
    {
        "type": Setting("str", "opencv"),
        "kwargs": Section({"image_dir": Setting("str"), "color_mode": Setting("str", "RGB")}),
    }
)
_AUGMENT = {name: Setting("bool", False) for name in ("hflip", "vflip", "rotate")}
_PERTRAINED = {name: Setting("str?", None) for name in ("pertrain_path", "pretrain_path")}

_UNET = {
    "classifier_width": Setting("int", 256, low=1),
    "classifier_depth": Setting("int", 2, low=1),
    "channel_mult": Setting("ints", [1, 1, 2, 2, 4, 4], low=1),
    "attention_resolutions": Setting("ints", [32, 16, 8], low=1),
    "class_number": Setting("int", low=1),
    "learn_sigma": Setting("bool", True),
    "dropout": Setting("float", 0.0, low=0, high=1),
    "num_heads": Setting("int", 4, low=1),
    "num_heads_upsample": Setting("int", -1, low=-1),
    "num_head_channels": Setting("int", 64, low=-1),
    "use_scale_shift_norm": Setting("bool", True),
    "resblock_updown": Setting("bool", True),
    "use_checkpoint": Setting("bool", False),
    **_PERTRAINED,
}
_CLASSIFIER = {
    "classifier_width": Setting("int", 128, low=1),
    "classifier_depth": Setting("int", 2, low=1),
    "channel_mult": Setting("ints", [1, 1, 2, 2, 4, 4], low=1),
    "classifier_attention_resolutions": Setting("ints", [32, 16, 8], low=1),
    "class_number": Setting("int", low=1),
    "classifier_use_scale_shift_norm": Setting("bool", True),
    "classifier_resblock_updown": Setting("bool", True),
    "classifier_pool": Setting("str", "attention"),
    "num_head_channels": Setting("int", 64, low=-1),
    "dropout": Setting("float", 0.0, low=0, high=1),
    "use_checkpoint": Setting("bool", False),
    **_PERTRAINED,
}
_SDAS_DATASET = Section(
    {
        "type": Setting("str", "sdas"),
        "image_reader": _READER,
        "train": Section({"meta_file": Setting("str"), **_AUGMENT}),
        "test": Section({"meta_file": Setting("str"), **_AUGMENT}),
        "input_size": Setting("ints", [256, 256], low=1, length=2),
        "batch_size": Setting("int", 5, low=1),
        "workers": Setting("int", 2, low=0),
        "cache_mb": Setting("int", 2048, low=0),
    }
)
_OPTIMIZER = Section({"type": Setting("str", "Adam"), "kwargs": Setting("map", {"lr": 1e-4})})
_TRAINER = {
    "max_epoch": Setting("int", 1000, low=1),
    "save_freq_step": Setting("int", 1000, low=0),
    "max_bad_steps": Setting("int", 20, low=1),
    "print_freq_step": Setting("int", 30, low=1),
    "amp": Setting("str", "off"),
    "channels_last": Setting("bool", False),
    "compile": Setting("bool", False),
    "optimizer": _OPTIMIZER,
}
_SDAS_TRAINER = {
    **_TRAINER,
    "use_fp16": Setting("bool", False),
    "accumulate": Setting("int", 1, low=1),
    "clip_max_norm": Setting("float?", 1.0, low=0),
    "val_batch_number": Setting("int", 6, low=1),
}


def _sampler(section_counts: str) -> Section:
    return Section(
        {
            "T": Setting("int", 1000, low=1),
            "section_counts": Setting("any", section_counts),
            "beta_scheduler": Setting("str", "linear"),
            "rescale_timesteps": Setting("bool", False),
        }
    )


def _saver(stage: str) -> Section:
    return Section(
        {
            "checkpoints_dir": Setting("str", f"{stage}_checkpoints/"),
            "log_dir": Setting("str", f"{stage}_log/"),
            "vis_dir": Setting("str", f"{stage}_vis/"),
            "results_dir": Setting("str", f"{stage}_results/"),
            "keep": Setting("int", 3, low=1),
        }
    )


_SEED = {"random_seed": Setting("int", 100, low=0, high=2**31 - 1)}

SETTINGS: dict[str, Section] = {
    "diffusion": Section(
        {
            **_SEED,
            "dataset": _SDAS_DATASET,
            "unet": Section(_UNET),
            "trainer": Section(
                {
                    **_SDAS_TRAINER,
                    "val_freq_epoch": Setting("int", 10, low=1),
                    "ema_decay": Setting("float", 0.9999, low=0, high=1),
                }
            ),
            "criterion": Setting("list", [{"name": "ImageMSELoss", "type": "ImageMSELoss"}]),
            "TrainSampler": _sampler("ddim1000"),
            "TestSampler": _sampler("ddim20"),
            "saver": _saver("diffusion"),
        }
    ),
    "classifier": Section(
        {
            **_SEED,
            "dataset": _SDAS_DATASET,
            "classifier": Section(_CLASSIFIER),
            "trainer": Section(
                {
                    **_SDAS_TRAINER,
                    "val_freq_epoch": Setting("int", 5, low=1),
                    "save_freq_epoch": Setting("int", 5, low=1),
                    "ema_decay": Setting("float?", None, low=0, high=1),
                }
            ),
            "criterion": Setting("list", []),
            "TrainSampler": _sampler("ddim1000"),
            "TestSampler": _sampler("ddim1000"),
            "saver": _saver("classifier"),
        }
    ),
    "sample": Section(
        {
            **_SEED,
            "dataset": Section(
                {
                    "batch_size": Setting("int", 16, low=1),
                    "channels": Setting("int", 3, low=3, high=3),
                    "H": Setting("int", 256, low=1),
                    "W": Setting("int", 256, low=1),
                }
            ),
            "classes": Setting("list?", None),
            "sample_number": Setting("int", low=1),
            "strength": Setting("floats", [0.1, 0.2], low=0, length=2),
            "sampler": Setting("str", "ancestral"),
            "amp": Setting("str", "off"),
            "classifier_scale": Setting("float", 1.0),
            "unet": Section(_UNET),
            "classifier": Section(_CLASSIFIER, optional=True),
            "TestSampler": _sampler("ddim20"),
            "workspace": Section({"root": Setting("str")}),
            "saver": _saver("sample"),
        }
    ),
    "realnet": Section(
        {
            **_SEED,
            "dataset": Section(
                {
                    "type": Setting("str"),
                    "image_reader": _READER,
                    "foreground": Setting("any", None),
                    "train": Section(
                        {
                            "meta_file": Setting("str"),
                            "dtd_dir": Setting("str?", None),
                            "sdas_dir": Setting("str?", None),
                            "dtd_transparency_range": Setting("floats", [0.2, 1.0], low=0, high=1, length=2),
                            "sdas_transparency_range": Setting("floats", [0.5, 1.0], low=0, high=1, length=2),
                            "perlin_scale": Setting("int", 6, low=1, high=12),
                            "min_perlin_scale": Setting("int", 0, low=0, high=11),
                            "anomaly_types": Setting("map"),
                            **_AUGMENT,
                        }
                    ),
                    "test": Section({"meta_file": Setting("str"), **_AUGMENT}),
                    "input_size": Setting("ints", [256, 256], low=1, length=2),
                    "pixel_mean": Setting("floats", [0.485, 0.456, 0.406], length=3),
                    "pixel_std": Setting("floats", [0.229, 0.224, 0.225], low=1e-6, length=3),
                    "batch_size": Setting("int", 16, low=1),
                    "workers": Setting("int", 4, low=0),
                    "cache_mb": Setting("int", 2048, low=0),
                }
            ),
            "structure": Setting("list"),
            "net": Setting("list"),
            "trainer": Section(
                {
                    **_TRAINER,
                    "val_freq_epoch": Setting("int", 5, low=1),
                    "clip_max_norm": Setting("float?", None, low=0),
                }
            ),
            "saver": _saver("realnet"),
            "criterion": Setting("list"),
            "evaluator": Section(
                {
                    "key_metric": Setting("str", "mean"),
                    "metrics": Setting("map", {"auc": [{"name": "image", "kwargs": {"avgpool_size": [16, 16]}}]}),
                }
            ),
        }
    ),
}

# ---- loading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as everyone who writes it means it (YAML 1.1 wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> EasyDict:
    """Read a settings file, apply `key.path=value` overrides, check it and fill in the defaults.

    Which script's file it is shows from its sections. Entries of a list are addressed by number or by their `name`:
    `net.backbone.kwargs.weights=random`.

    Raises:
        UsageError: the file is missing or no YAML, a key is unknown, missing or of the wrong type. All problems are
            in one message.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UsageError(f"{path}{where}: not readable as YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: has to hold settings, one `key: value` a line")
    for override in overrides:
        _apply(raw, override)
    problems: list[str] = []
    config = _check(raw, SETTINGS[_kind(raw, path)], "", problems)
    if problems:
        raise UsageError("\n".join(f"{path}: {problem}" for problem in problems))
    return EasyDict(config)


def _kind(raw: dict, path: Path) -> str:
    if "net" in raw:
        return "realnet"
    if "workspace" in raw or "sample_number" in raw:
        return "sample"
    if "unet" in raw:
        return "diffusion"
    if "classifier" in raw:
        return "classifier"
    raise UsageError(f"{path}: has none of the sections net, unet, classifier; whose settings are these?")


def _apply(raw: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"--set {override}: write it as key.path=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UsageError(f"--set {override}: the value is not readable as YAML") from None
    node: Any = raw
    *parents, last = name.strip().split(".")
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[node.index(_child(node, last, override))] = value
    else:
        node[last] = value


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        for i, entry in enumerate(node):
            if part == str(i) or (isinstance(entry, dict) and entry.get("name") == part):
                return entry
        raise UsageError(f"--set {override}: there is no entry {part!r} in that list")
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], (dict, list)):
        raise UsageError(f"--set {override}: {part} is a value, not a section")
    return node[part]


def _check(raw: Any, section: Section, prefix: str, problems: list[str]) -> dict | None:
    if raw is None and section.optional:
        return None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        problems.append(f"{prefix.rstrip('.')} has to be a section of settings, not {raw!r}")
        return {}
    for name in raw:
        if name not in section.keys:
            problems.append(f"{prefix}{name} is not a setting{_suggest(str(name), section, prefix)}")
    checked = {}
    for name, entry in section.keys.items():
        if isinstance(entry, Section):
            checked[name] = _check(raw.get(name), entry, f"{prefix}{name}.", problems)
        elif name in raw:
            checked[name] = raw[name]
            problem = _problem(raw[name], entry)
            if problem:
                problems.append(f"{prefix}{name}: {_shortened(raw[name])} {problem}")
        elif entry.default is _MISSING:
            problems.append(f"{prefix}{name} is missing")
        else:
            checked[name] = entry.default
    return checked


def _problem(value: Any, setting: Setting) -> str | None:
    """What is wrong with a value, or None."""
    if not _fits(value, setting.kind):
        return f"is not {_KINDS[setting.kind.rstrip('?')]}"
    if setting.length is not None and len(value) != setting.length:
        return f"has to hold {setting.length} numbers"
    if setting.kind.rstrip("?") in ("ints", "floats") and not value and setting.length is None:
        return "is empty"
    numbers = value if isinstance(value, list) else [value]
    for number in numbers if setting.kind.rstrip("?") in ("int", "float", "ints", "floats") else []:
        if number is None:
            continue
        if not math.isfinite(number):
            return "is not finite"
        if setting.low is not None and number < setting.low:
            return f"has to be at least {setting.low:g}"
        if setting.high is not None and number > setting.high:
            return f"has to be at most {setting.high:g}"
    return None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _suggest(name: str, section: Section, prefix: str) -> str:
    close = difflib.get_close_matches(name, section.keys, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known are {', '.join(section.keys)}"


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "a text",
    "ints": "a list of whole numbers",
    "floats": "a list of numbers",
    "list": "a list",
    "map": "a mapping",
    "any": "a value",
}


def _fits(value: Any, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or _fits(value, kind[:-1])
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return {
        "int": whole,
        "float": number,
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "ints": isinstance(value, list) and all(_fits(v, "int") for v in value),
        "floats": isinstance(value, list) and all(_fits(v, "float") for v in value),
        "list": isinstance(value, list),
        "map": isinstance(value, dict),
        "any": True,
    }[kind]


def check_together(path: str | Path, checks: Sequence[tuple[str, Callable[[], Any]]]) -> None:
    """Run checks of settings, and report all that fail in one message that names the file.

    Args:
        path: of the settings.
        checks: what each looks at, and a function that raises where that does not fit.

    Raises:
        UsageError: one line for each that failed.
    """
    problems = []
    for section, check in checks:
        try:
            check()
        except UsageError as error:
            problems += [text if text.startswith(str(path)) else f"{path}: {text}" for text in str(error).splitlines()]
        except RunError:
            # Not a mistake in the settings, weights that cannot be had here for one: it comes up in its turn.
            continue
        # What torch and Python raise on values that make no sense to them.
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"{path}: {section}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))


def plain(config: Any) -> Any:
    """The settings as plain dicts and lists, for checkpoints."""
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config


def pretrained_path(section: dict) -> str | None:
    """The starting weights of a `unet` or `classifier` section, in either spelling."""
    return section.get("pretrain_path") or section.get("pertrain_path")


def model_kwargs(section: dict) -> dict:
    """A `unet` or `classifier` section as keyword arguments of its factory, without the weights."""
    return {key: value for key, value in section.items() if key not in ("pertrain_path", "pretrain_path")}
