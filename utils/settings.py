"""Every setting of the YAML files: type, default, bounds or choices, meaning. utils/config.py checks with them.

python -m utils.settings > docs/settings.md        writes the page that documents them
"""

from collections.abc import Sequence
from dataclasses import replace

from utils.choices import DISCRIMINATOR, PRECISIONS, SCORES
from utils.detector_settings import AUC, FEATURES, MOST_PIXELS, NET, STRUCTURE, losses
from utils.names import folder_problem, name_problem
from utils.setting_types import Section, Setting, settings_page

# ---- shared by several files -----------------------------------------------------------------------------------------

MOST_IMAGES = 65_536  # in a batch


def _heads_problem(channels: int) -> str | None:
    return "has to be -1 or at least 1" if channels == 0 else None


def _classes_problem(classes: list[str]) -> str | None:
    problems = (f"holds {name[:80]!r}, which {name_problem(name)}" for name in classes if name_problem(name))
    return next(problems, None)


_SEED = {
    "version": Setting("str?", "The version of the reference program that the file is for.", None, legacy=True),
    "random_seed": Setting("int", "Seed of every random draw of the run.", 100, low=0, high=2**31 - 1),
}
_COLOR_MODE_HELP = "RGB; GRAY shows networks three equal channels, for grey images; BGR swaps red and blue."
_BITS_HELP = "Bits that the camera fills in 16-bit files, e.g. 12; null means 16. Set it if such images come out black."
_LINKS_HELP = "Take images that are reached by links below image_dir which lead out of it; else they are refused."
_MEGAPIXELS_HELP = "Larger images are refused: a small file may unpack to gigabytes."
_READER = Section(
    {
        "type": Setting("str", "Images are always read by Pillow.", "opencv", legacy=True),
        "kwargs": Section(
            {
                "image_dir": Setting(
                    "str", "Folder that the file names in the image lists are relative to.", check=folder_problem
                ),
                "color_mode": Setting("str", _COLOR_MODE_HELP, "RGB", choices=("RGB", "BGR", "GRAY")),
                "bits": Setting("int?", _BITS_HELP, None, low=8, high=16),
                "follow_links": Setting("bool", _LINKS_HELP, False),
                "max_megapixels": Setting("int", _MEGAPIXELS_HELP, 178, low=1, high=100_000),
            }
        ),
    }
)
_AUGMENT = {
    "hflip": Setting("bool", "Mirror half of the training images left to right, if mirrored parts are normal.", False),
    "vflip": Setting("bool", "Mirror half of the training images top to bottom, if mirrored parts are normal.", False),
    "rotate": Setting("bool", "Turn training images by 0, 90, 180 or 270 degrees (0 or 180 if not square).", False),
}
_NOT_AUGMENTED = {name: Setting("bool", "Test images are never augmented.", False, legacy=True) for name in _AUGMENT}
_INPUT_SIZE_HELP = "[height, width] that images are resized to. The U-Nets of SDAS need multiples of 2 ** (levels - 1)."
_LOADING = {
    "workers": Setting(
        "int", "Processes that load images, per rank; results do not depend on it.", 2, low=0, high=1000
    ),
    "cache_mb": Setting(
        "int", "MiB of shared memory for resized training images; 0: no cache.", 2048, low=0, high=2**24
    ),
}
_CHECKPOINT_HELP = "Recompute activations in the backward pass: far less memory, about a third slower."
_WIDTH_HELP = "Channels of the first level, a multiple of 32. Fixed by the weights that training starts from."
_START_HELP = "Weights to start from: a file, or null to train from scratch; in sample.yaml, the trained checkpoint"
_WINDOW_HELP = (
    "Side in pixels of the windows within which attention looks, if the image is larger; null: the whole image. For "
    "models that are trained on crops."
)
_NETWORK = {
    "classifier_depth": Setting("int", "Residual blocks per level.", 2, low=1, high=32),
    "channel_mult": Setting(
        "ints", "Width multiplier of each level; one entry a level.", [1, 1, 2, 2, 4, 4], low=1, high=32
    ),
    "class_number": Setting("int", "Number of classes, at least as many as the image list has.", low=1, high=100_000),
    "dropout": Setting("float", "Dropout probability in the residual blocks.", 0.0, low=0, below=1),
    "num_head_channels": Setting(
        "int", "Channels per attention head; -1: use num_heads.", 64, low=-1, high=4096, check=_heads_problem
    ),
    "attention_window": Setting("int?", _WINDOW_HELP, None, low=1, high=MOST_PIXELS),
    "use_checkpoint": Setting("bool", _CHECKPOINT_HELP, False),
    "pertrain_path": Setting("str?", f"{_START_HELP} or the folder with it (the reference's spelling).", None),
    "pretrain_path": Setting("str?", "The same as pertrain_path, which it overrides.", None),
}
_ATTENTION_HELP = "Downsampling factors (not pixel sizes) of the levels with attention."
_UNET = {
    "classifier_width": Setting("int", _WIDTH_HELP, 256, low=1, high=4096),
    **_NETWORK,
    "attention_resolutions": Setting("ints", _ATTENTION_HELP, [32, 16, 8], low=1),
    "learn_sigma": Setting("bool", "Predict the variance of the reverse process too.", True),
    "num_heads": Setting("int", "Attention heads, where num_head_channels is -1.", 4, low=1, high=4096),
    "num_heads_upsample": Setting(
        "int",
        "Attention heads of the decoder; -1: num_heads.",
        -1,
        low=-1,
        high=4096,
        check=_heads_problem,
        legacy=True,
    ),
    "use_scale_shift_norm": Setting("bool", "Condition by scale and shift (FiLM), not by addition.", True),
    "resblock_updown": Setting("bool", "Change the resolution in residual blocks, not by plain convolutions.", True),
}
_CLASSIFIER = {
    "classifier_width": Setting("int", _WIDTH_HELP, 128, low=1, high=4096),
    **_NETWORK,
    "classifier_attention_resolutions": Setting("ints", _ATTENTION_HELP, [32, 16, 8], low=1),
    "classifier_use_scale_shift_norm": _UNET["use_scale_shift_norm"],
    "classifier_resblock_updown": _UNET["resblock_updown"],
    "classifier_pool": Setting(
        "str", "Head that turns features into class scores; attention fits OpenAI's weights.", "attention",
        choices=("adaptive", "attention", "spatial", "spatial_v2"),
    ),
}  # fmt: skip
_CROP_HELP = (
    "[height, width] of random parts of the resized images to train on; null: whole images. A small model then draws "
    "their grain, at any size."
)
_SCALED_HELP = "Not used here: SDAS scales images to -1 .. 1."
_SDAS_DATASET = Section(
    {
        "type": Setting("str", "The name of the data set; not used here.", "sdas", legacy=True),
        "image_reader": _READER,
        "train": Section(
            {"meta_file": Setting("str", "Image list to train on; only its good images are used."), **_AUGMENT}
        ),
        "test": Section(
            {
                "meta_file": Setting(
                    "str?", "Image list to validate on; only its good images are used. null: the training list.", None
                ),
                **_NOT_AUGMENTED,
            }
        ),
        "input_size": Setting("ints", _INPUT_SIZE_HELP, [256, 256], low=1, high=MOST_PIXELS, length=2),
        "crop": Setting("ints?", _CROP_HELP, None, low=1, high=MOST_PIXELS, length=2),
        "pixel_mean": Setting("floats?", _SCALED_HELP, None, length=3, legacy=True),
        "pixel_std": Setting("floats?", _SCALED_HELP, None, length=3, legacy=True),
        "batch_size": Setting(
            "int", "Images per rank and forward pass. Lower it when memory runs out.", 5, low=1, high=MOST_IMAGES
        ),
        **_LOADING,
    }
)
_AMP_HELP = "Mixed precision. bf16 saves time and memory; auto uses it if the device supports it natively."
_AMP = Setting("str", _AMP_HELP, "off", choices=PRECISIONS)
_TF32_HELP = "On a GPU, round the factors of float32 products to 10 bits (TensorFloat-32): faster, hardly less exact."
_TF32 = Setting("bool", _TF32_HELP, True)
_BENCHMARK_HELP = "On a GPU, time cuDNN's kernels and take the fastest; two runs may differ in the last bits."
_ADAM_HELP = "Its arguments; lr is the one to change."
_TRAINER = {
    "max_epoch": Setting("int", "Epochs to train for.", 1000, low=1),
    "max_step": Setting("int?", "Optimiser steps to train for, if max_epoch is not reached before.", None, low=1),
    "schedule": Section(
        {
            "type": Setting(
                "str",
                "Learning rate after the warm-up: as it is, or falling to 0 along a cosine.",
                "constant",
                choices=("constant", "cosine"),
            ),
            "warmup_steps": Setting("int", "Steps in which it rises from 0, linearly.", 0, low=0, high=10**9),
        }
    ),
    "save_freq_step": Setting("int", "Steps between two saves to resume from; 0: only between epochs.", 1000, low=0),
    "max_bad_steps": Setting("int", "Skipped steps in a row (loss not finite) after which the run ends.", 20, low=1),
    "print_freq_step": Setting("int", "Steps between two lines of the log.", 30, low=1),
    "amp": _AMP,
    "channels_last": Setting("bool", "Keep convolutions in channels-last layout; often faster with amp.", False),
    "compile": Setting("bool", "Compile the trained networks (torch.compile): a slow start, then faster steps.", False),
    "tf32": _TF32,
    "cudnn_benchmark": Setting("bool", _BENCHMARK_HELP, True),
    "optimizer": Section(
        {
            "type": Setting("str", "A class of torch.optim.", "Adam"),
            "kwargs": Setting("map", _ADAM_HELP, {"lr": 1e-4}),
        }
    ),
}
_CLIP_HELP = "Gradients with a larger norm are scaled down to this norm; null does not clip."
_VALIDATION_HELP = "Epochs between two validations; the last epoch always has one."
_EMA = Setting("float?", "Decay of averaged weights, warmed up; null keeps none.", None, low=0, high=1)
_SDAS_TRAINER = {
    **_TRAINER,
    "val_freq_epoch": Setting("int", _VALIDATION_HELP, 10, low=1),
    "use_fp16": Setting("bool", "The reference's key: if amp is off, True means amp: fp16.", False),
    "accumulate": Setting(
        "int", "Batches averaged per optimiser step; raise it for a small batch_size.", 1, low=1, high=MOST_IMAGES
    ),
    "clip_max_norm": Setting("float?", _CLIP_HELP, 1.0, above=0),
    "val_batch_number": Setting("int", "Batches of test images that a validation reconstructs.", 6, low=1),
}


def _process(section_counts: str, use: str) -> Section:
    """The keys of a diffusion process."""
    return Section(
        {
            "T": Setting("int", "Timesteps of the full process.", 1000, low=1, high=100_000),
            "section_counts": Setting(
                "any",
                f"Timesteps kept for {use}: ddimN at equal strides, logsnrN at equal steps of log(alpha / sigma), "
                "or a count for each equal section.",
                section_counts,
            ),
            "beta_scheduler": Setting("str", "Noise schedule: linear, cosine, or const<beta>.", "linear"),
            "rescale_timesteps": Setting(
                "bool", "Scale the network's timesteps to 0 .. 1000; as in training.", False, legacy=True
            ),
        }
    )  # fmt: skip


_KEEP_PICTURES_HELP = "Validations whose pictures are kept, in vis_dir and tensorboard; older ones are deleted."


def _folder(what: str, default: str) -> Setting:
    return Setting("str", f"{what}, under experiments/<dataset>/.", default, check=folder_problem)


def _saver(stage: str, unused: Sequence[str]) -> Section:
    """The keys that say where a script writes.

    Args:
        unused: keys that the scripts with this file make no use of, but accept.
    """
    keys = {
        "checkpoints_dir": _folder("Checkpoints", f"{stage}_checkpoints/"),
        "log_dir": _folder("Logs and tensorboard files", f"{stage}_log/"),
        "vis_dir": _folder("Pictures for people", f"{stage}_vis/"),
        "results_dir": _folder("Tables and report", f"{stage}_results/"),
        "keep": Setting("int", "Numbered checkpoints to keep; older ones are deleted.", 3, low=1),
        "keep_pictures": Setting("int", _KEEP_PICTURES_HELP, 5, low=1),
    }
    return Section(keys | {name: replace(keys[name], help="Not used here.", legacy=True) for name in unused})


# ---- one table per file ----------------------------------------------------------------------------------------------

_KID_HELP = (
    "Images, over all classes (at least 4 of each), that a validation draws at each strength to measure their distance "
    "from training images (KID); 0: none."
)
_DIFFUSION = Section(
    {
        **_SEED,
        "dataset": _SDAS_DATASET,
        "unet": Section(_UNET),
        "trainer": Section(
            {
                **_SDAS_TRAINER,
                "ema_decay": Setting(
                    "float", "Decay of the averaged weights, which sampling uses; warmed up.", 0.9999, low=0, high=1
                ),
                "val_kid_images": Setting("int", _KID_HELP, 32, low=0, high=10**6),
            }
        ),
        "criterion": losses(
            "Losses of the validation's reconstructions, each {name, type: ImageMSELoss, kwargs: {weight}}.",
            [{"name": "ImageMSELoss", "type": "ImageMSELoss"}],
        ),
        "TrainSampler": _process("ddim1000", "training"),
        "TestSampler": _process("ddim20", "the validation's images"),
        "features": FEATURES,
        "saver": _saver("diffusion", ["results_dir"]),
    }
)  # fmt: skip

_CLASSIFIER_FILE = Section(
    {
        **_SEED,
        "dataset": _SDAS_DATASET,
        "classifier": Section(_CLASSIFIER),
        "trainer": Section(
            {
                **_SDAS_TRAINER,
                "val_freq_epoch": Setting("int", _VALIDATION_HELP, 5, low=1),
                "val_batch_number": Setting(
                    "int", "Not used here: validations go over all images.", 6, low=1, legacy=True
                ),
                "save_freq_epoch": Setting("int", "Epochs between two numbered checkpoints.", 5, low=1),
                "ema_decay": _EMA,
            }
        ),
        "criterion": Setting("list?", "The loss is always the cross entropy.", [], legacy=True),
        "TrainSampler": _process("ddim1000", "training"),
        "TestSampler": _process("ddim1000", "validation"),
        "saver": _saver("classifier", ["vis_dir", "results_dir"]),
    }
)

_FROM_CHECKPOINT = Setting("int?", "Number of classes, if the checkpoint does not hold it.", None, low=1, high=100_000)
_SAMPLE = Section(
    {
        **_SEED,
        "dataset": Section(
            {
                "batch_size": Setting(
                    "int", "Images drawn at once, per rank; lower it to save memory.", 16, low=1, high=MOST_IMAGES
                ),
                "channels": Setting("int", "Images always have three channels.", 3, low=3, high=3, legacy=True),
                "H": Setting(
                    "int?", "Height of the images; null: as the model was trained.", None, low=1, high=MOST_PIXELS
                ),
                "W": Setting(
                    "int?", "Width of the images; null: as the model was trained.", None, low=1, high=MOST_PIXELS
                ),
            }
        ),
        "classes": Setting(
            "strs?", "Class names in the order of their numbers, if the checkpoint lacks them.", None,
            check=_classes_problem,
        ),
        "sample_number": Setting("int", "Images per class; the paper draws 10000.", low=1, high=10**8),
        "strength": Setting(
            "floats",
            "Range [low, high] of the anomaly strength s; 0 draws normal images. For ddim, 0.01 .. 0.03; for dpmpp_2m, "
            "[0, 0].",
            [0.1, 0.2], low=0, high=100, length=2,
        ),
        "color_mode": Setting(
            "str",
            "RGB; GRAY makes the drawn images grey, for grey training images, which a model tints at first.",
            "RGB",
            choices=("RGB", "GRAY"),
        ),
        "start_depth": Setting(
            "floats?",
            "Range [low, high] of the share of all timesteps that good training images are noised to, to begin with; "
            "null: pure noise (the paper). For models that are trained briefly or on crops.",
            None, low=0, high=1, length=2,
        ),
        "sampler": Setting(
            "str",
            "How a step is drawn: with the learned variance (ancestral), deterministic (ddim; dpmpp_2m: second order), "
            "or dpmpp_2m with noise (dpmpp_2m_sde). The last two want section_counts: logsnr10.",
            "ancestral",
            choices=("ancestral", "ddim", "dpmpp_2m", "dpmpp_2m_sde"),
        ),
        "amp": _AMP,
        "tf32": _TF32,
        "classifier_scale": Setting(
            "float", "Guidance scale; larger is truer to the class, and less varied.", 1.0, low=-1e4, high=1e4
        ),
        "unet": Section({**_UNET, "class_number": _FROM_CHECKPOINT}),
        "classifier": Section({**_CLASSIFIER, "class_number": _FROM_CHECKPOINT}, optional=True),
        "TestSampler": _process("ddim20", "sampling"),
        "features": FEATURES,
        "workspace": Section(
            {"root": Setting("str", "Folder of the images; each class gets a folder in it.", check=folder_problem)}
        ),
        "saver": _saver("sample", ["checkpoints_dir", "results_dir", "keep"]),
    }
)  # fmt: skip

_SYNTHESIS = {
    "dtd_dir": Setting("str?", "Folder of textures for the anomaly type dtd; any images will do.", None),
    "sdas_dir": Setting("str?", "Folder of sample.py's images for the anomaly type sdas; {} is the class.", None),
    "edit_dir": Setting(
        "str?", "Folder of pairs of synthesize.py --source edit for the anomaly type edit; {} is the class.", None
    ),
    "dtd_transparency_range": Setting(
        "floats", "Range of the opacity of blended textures; lower is fainter.", [0.2, 1.0], low=0, high=1, length=2
    ),
    "sdas_transparency_range": Setting(
        "floats", "Range of the opacity of blended SDAS images.", [0.5, 1.0], low=0, high=1, length=2
    ),
    "perlin_scale": Setting("int", "Finest anomalies: up to 2 ** (this - 1) noise cells per side.", 6, low=1, high=12),
    "min_perlin_scale": Setting(
        "int", "Coarsest anomalies: 2 ** this noise cells per side. Raise it to leave out large ones.", 0,
        low=0, high=11,
    ),
    "anomaly_types": Setting(
        "shares",
        "Probability of each type of training sample; they add up to 1. cutpaste, self and noise need no other images.",
        low=0, choices=("normal", "sdas", "dtd", "edit", "cutpaste", "self", "noise"),
    ),
    "match_grey": Setting(
        "bool",
        "Make the anomalies of grey images grey, as they are with color_mode: GRAY in any case. False repeats the "
        "paper's figures; True is for data of one's own.",
        False,
    ),
}  # fmt: skip
_FOREGROUND_HELP = (
    "Where anomalies may lie: null (the rule of dataset.type's class), none (everywhere), auto, a rule such as "
    "MVTec-AD/bottle, or {channel, threshold, invert, close, open}."
)
_JITTER_HELP = "Scale contrast and brightness of training images by 1 - this .. 1 + this, if exposure varies."
_HELD_OUT_HELP = (
    "Share of the good images (at least 8, at most half) that is not trained on: thresholds and "
    "evaluator.select: synthetic need it."
)
_PARTS_HELP = (
    "Which images show the same part: a CSV file (file, part) or a regular expression for file names, e.g. part\\d+. A "
    "part's images are held out together or not at all."
)
_SELECT_HELP = (
    "Which checkpoint becomes ckpt_best: the best on the test list (the paper's protocol), the best on held-out good "
    "images with synthetic anomalies, or the last."
)
_SCORE_HELP = (
    "What anomaly maps are made of: the discriminator's output (the paper), the residual, both, or the residual and "
    "the novelty, which knows nothing of training anomalies."
)
_REALNET = Section(
    {
        **_SEED,
        "dataset": Section(
            {
                "type": Setting("str", "mvtec, visa, mpdd, btad, or a name of your own; picks foreground rules."),
                "image_reader": _READER,
                "foreground": Setting("any", _FOREGROUND_HELP, None),
                "train": Section(
                    {
                        "meta_file": Setting("str", "Image list to train on; {} is the class."),
                        **_SYNTHESIS,
                        **_AUGMENT,
                        "jitter": Setting("float", _JITTER_HELP, 0.0, low=0, below=1),
                        "validation_fraction": Setting("float", _HELD_OUT_HELP, 0.0, low=0, high=0.5),
                        "parts": Setting("str?", _PARTS_HELP, None),
                    }
                ),
                "test": Section(
                    {"meta_file": Setting("str", "Image list to test on; {} is the class."), **_NOT_AUGMENTED}
                ),
                "input_size": Setting(
                    "ints", "[height, width] that images are resized to; any size works.", [256, 256],
                    low=1, high=MOST_PIXELS, length=2,
                ),
                "pixel_mean": Setting(
                    "floats", "Mean of RGB in 0 .. 1 that the backbone's weights expect.", [0.485, 0.456, 0.406],
                    low=0, high=1, length=3,
                ),
                "pixel_std": Setting(
                    "floats", "Standard deviation that they expect.", [0.229, 0.224, 0.225], low=1e-6, high=10, length=3
                ),
                "batch_size": Setting(
                    "int", "Images per rank and step. Lower it when memory runs out.", 16, low=1, high=MOST_IMAGES
                ),
                **_LOADING,
                "workers": Setting("int", _LOADING["workers"].help, 4, low=0, high=1000),
            }
        ),
        "structure": STRUCTURE,
        "net": NET,
        "trainer": Section(
            {
                **_TRAINER,
                "val_freq_epoch": Setting("int", _VALIDATION_HELP, 5, low=1),
                "clip_max_norm": Setting("float?", _CLIP_HELP, None, above=0),
                "ema_decay": _EMA,
                "patience": Setting(
                    "int?", "Validations without a better ckpt_best after which training ends; null: none.", None, low=1
                ),
            }
        ),
        "saver": _saver("realnet", ["keep"]),
        "criterion": losses(
            "Losses {name, type, kwargs}: SegmentCrossEntropyLoss or SegmentFocalLoss, and FeatureMSELoss."
        ),
        "evaluator": Section(
            {
                "key_metric": Setting(
                    "str", "AUROC that selects the best checkpoint: image, pixel, or the mean of both.", "mean",
                    choices=("mean", "image", "pixel"),
                ),
                "score": Setting("str", _SCORE_HELP, DISCRIMINATOR, choices=SCORES),
                "select": Setting("str", _SELECT_HELP, "test", choices=("test", "synthetic", "last")),
                "metrics": Section({"auc": AUC}),
            }
        ),
    }
)  # fmt: skip

SETTINGS: dict[str, Section] = {
    "diffusion": _DIFFUSION,
    "classifier": _CLASSIFIER_FILE,
    "sample": _SAMPLE,
    "realnet": _REALNET,
}


if __name__ == "__main__":
    print(settings_page(SETTINGS), end="")
