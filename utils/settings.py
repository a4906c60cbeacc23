"""Every setting of the YAML files with its type, default and bounds; utils/config.py checks files against it."""

from dataclasses import dataclass
from typing import Any

MISSING = object()


@dataclass(frozen=True)
class Setting:
    """One key: its type, its default where it may be left out, and what its numbers are confined to.

    `kind` is int, float, bool, str, ints, floats, list, map or any; a "?" behind it admits null. `low` and `high` bound
    numbers, also those in a list; `length` is that of a list.
    """

    kind: str
    default: Any = MISSING
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
