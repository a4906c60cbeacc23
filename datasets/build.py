"""Builds data sets from settings, and checks the settings without opening images."""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from easydict import EasyDict

from datasets.catalog import ForegroundRule
from datasets.foreground import rule_for
from datasets.images import Augmentation, Preprocessing, allow_megapixels
from datasets.lists import ImageList, Sample, class_names, read_list
from datasets.local_anomalies import LOCAL
from datasets.parts import parts_of
from datasets.realnet import CachedImages, RealNetTestSet, RealNetTrainSet
from datasets.sdas import SDASDataset
from datasets.sources import WITHOUT_FOLDER
from datasets.splits import fingerprint, split_good
from datasets.synthesis import Synthesis
from datasets.validation import HeldOutSet
from utils import distributed
from utils.config import load_config
from utils.counts import counted
from utils.distributed import Run
from utils.errors import UsageError
from utils.log import progress_bar
from utils.signals import StopRequest

log = logging.getLogger("realnet")

AUTO_IMAGES = 32  # training images that `foreground: auto` examines
FEWEST_HELD_OUT = 8


def preprocessing_of(config: EasyDict) -> Preprocessing:
    """How a realnet.yaml's `dataset` section turns images into tensors."""
    reader = config.image_reader.kwargs
    mean, std = tuple(config.pixel_mean), tuple(config.pixel_std)
    return Preprocessing(tuple(config.input_size), mean, std, reader.color_mode, reader.bits)


def _augmentation(section: EasyDict) -> Augmentation:
    return Augmentation(section.hflip, section.vflip, section.rotate, section.get("jitter", 0.0))


def _image_folder(config: EasyDict) -> str:
    """The image folder of a `dataset` section; sets the size from which its images are refused."""
    reader = config.image_reader.kwargs
    allow_megapixels(reader.max_megapixels)
    return reader.image_dir


# ---- diffusion.yaml, classifier.yaml ---------------------------------------------------------------------------------


def build_sdas_dataset(config: EasyDict, split: str, classes: list[str] | None, seed: int) -> SDASDataset:
    """Build the data set of a diffusion.yaml or classifier.yaml.

    Args:
        config: its `dataset` section.
        split: "train" or "test". Uses good images only; if the test list has none, it uses the training images.
        classes: class names in the order of the class numbers, or None to take them from the list.
    """
    section, root = config[split], _image_folder(config)
    path = section.meta_file or config.train.meta_file
    samples = _good_samples(config, path, classes, may_be_empty=split == "test")
    if not samples and split == "test":
        log.info("%s: holds no good image; the training images are used instead", path)
        samples = _good_samples(config, config.train.meta_file, classes)
    if classes is None:
        classes = class_names(samples)
    if not samples:
        raise UsageError(f"{path}: holds no good image" + (f" of {', '.join(classes)}" if classes else ""))
    augmentation = _augmentation(section) if split == "train" else Augmentation()
    cache_mb = config.cache_mb if split == "train" else 0
    images, centred = ImageList(samples, Path(root)), split == "test"
    reader = config.image_reader.kwargs
    reading = _sdas_preprocessing(config.input_size, reader.color_mode, reader.bits)
    return SDASDataset(images, classes, reading, augmentation, seed, cache_mb, config.crop, centred)


def _sdas_preprocessing(size: Sequence[int], color_mode: str, bits: int | None) -> Preprocessing:
    # The order of the channels is that of the files that sample.py writes.
    mode = "GRAY" if color_mode == "GRAY" else "RGB"
    return Preprocessing(tuple(size), (0.5,) * 3, (0.5,) * 3, mode, bits)


def good_images_of_sdas(experiment: Path, size: Sequence[int], seed: int, needed_by: str) -> SDASDataset:
    """The images that the diffusion model of an experiment was trained on, whole, at another size.

    Args:
        experiment: the folder of diffusion.yaml.
        size: (height, width).
        needed_by: what asks for them, for the message.

    Raises:
        UsageError: diffusion.yaml is missing, or its list cannot be read.
    """
    path = experiment / "diffusion.yaml"
    if not path.is_file():
        raise UsageError(f"{path} does not exist, which names the training images that {needed_by}")
    overrides = [f"dataset.input_size={list(size)}", "dataset.crop=null", "dataset.cache_mb=0"]
    return build_sdas_dataset(load_config(path, overrides, "diffusion").dataset, "train", None, seed)


def sdas_reading(experiment: Path, size: Sequence[int], color_mode: str) -> Preprocessing:
    """How a given image is read for the diffusion model of an experiment: as its diffusion.yaml says, if there is one.

    Args:
        experiment: the folder of diffusion.yaml.
        size: (height, width).
        color_mode: that of drawn images; GRAY reads grey images, too.
    """
    path, modes, bits = experiment / "diffusion.yaml", [color_mode], None
    if path.is_file():
        config = load_config(path, (), "diffusion").dataset
        reader = config.image_reader.kwargs
        allow_megapixels(reader.max_megapixels)
        modes, bits = [color_mode, reader.color_mode], reader.bits
    return _sdas_preprocessing(size, "GRAY" if "GRAY" in modes else "RGB", bits)


def check_sdas_list(config: EasyDict, split: str, network: str) -> None:
    """Check an image list of a diffusion.yaml or classifier.yaml, without opening the images.

    Args:
        network: the section whose class_number must be large enough, "unet" or "classifier".
    """
    path = config.dataset[split].meta_file or config.dataset.train.meta_file
    samples = _good_samples(config.dataset, path, None, may_be_empty=split == "test")
    if not samples and split == "train":
        raise UsageError(f"{path}: holds no good image")
    classes, class_number = class_names(samples), config[network].class_number
    if len(classes) > class_number:
        raise UsageError(f"{network}.class_number: {class_number}, but {path} has {counted(len(classes), 'class')}")


def _listed(config: EasyDict, path: str, may_be_empty: bool = False) -> list[Sample]:
    """The lines of an image list, by a `dataset` section's folder and rule for links."""
    return read_list(path, _image_folder(config), may_be_empty, config.image_reader.kwargs.follow_links)


def _good_samples(config: EasyDict, path: str, classes: list[str] | None, may_be_empty: bool = False) -> list[Sample]:
    samples = _listed(config, path, may_be_empty)
    return [s for s in samples if s.label == 0 and (classes is None or s.clsname in classes)]


# ---- realnet.yaml ----------------------------------------------------------------------------------------------------


def build_realnet_train_set(
    config: EasyDict, class_name: str, seed: int, held_out: Collection[str] = ()
) -> RealNetTrainSet:
    """Build the training set of a class from a realnet.yaml's `dataset` section.

    Args:
        held_out: file names of good images that are not trained on.
    """
    images = training_images(config, class_name)
    images = ImageList([sample for sample in images.samples if sample.filename not in held_out], images.image_dir)
    preprocessing, synthesis = preprocessing_of(config), _synthesis(config)
    rules = foreground_rules(config, images, preprocessing)
    cached = CachedImages(images, rules, preprocessing, config.cache_mb)
    return RealNetTrainSet(cached, synthesis, _augmentation(config.train), seed)


def training_images(config: EasyDict, class_name: str) -> ImageList:
    """All good images of a class's training list."""
    root, path = _image_folder(config), config.train.meta_file.replace("{}", class_name)
    images = ImageList(_good_samples(config, path, None), Path(root))
    if not len(images):
        raise UsageError(f"{path}: holds no good image")
    return images


def choose_held_out(
    config: EasyDict, class_name: str, seed: int, progress: Callable[[Iterable], Iterable] = lambda items: items
) -> list[str]:
    """Choose the good images that are not trained on, by file name: dataset.train.validation_fraction of each class.

    At least 8, but at most half of them; near-duplicates and the images of one part (dataset.train.parts) stay on one
    side.

    Args:
        progress: wraps the images that are read, to show how far it is.
    """
    fraction = config.train.validation_fraction
    images = training_images(config, class_name)
    if not fraction:
        return []
    parts = parts_of(config.train.parts, [sample.filename for sample in images.samples])
    preprocessing = preprocessing_of(config)
    prints = {
        sample.filename: fingerprint(preprocessing.read(images.path(index)))
        for index, sample in enumerate(progress(images.samples))
    }
    chosen = []
    for name in class_names(images.samples):
        good = [sample for sample in images.samples if sample.clsname == name]
        if len(good) > 1:
            rest, held_out = split_good(good, prints, fraction, seed, FEWEST_HELD_OUT, parts)
            chosen += held_out
            if parts:
                left, out = (len({parts.get(s.filename, s.filename) for s in side}) for side in (rest, held_out))
                log.info("%s: %s to train on, %d held out", name, counted(left, "part"), out)
    return [sample.filename for sample in chosen]


def hold_out(config: EasyDict, class_name: str, seed: int, run: Run, stop: StopRequest) -> list[str]:
    """Choose as choose_held_out does, on rank 0, and say how far it is; all ranks get the names."""
    bar = partial(progress_bar, run=run, description="near-duplicates", stop=stop)
    return distributed.on_main(lambda: choose_held_out(config, class_name, seed, bar))


def build_held_out_set(
    config: EasyDict, class_name: str, train_set: RealNetTrainSet, held_out: Collection[str]
) -> HeldOutSet:
    """The validation set of the images that a training set leaves out; anomalies of its types and of LOCAL."""
    every = training_images(config, class_name)
    parts = parts_of(config.train.parts, [sample.filename for sample in every.samples])
    images = ImageList([sample for sample in every.samples if sample.filename in held_out], every.image_dir)
    trained = [name for name, share in train_set.synthesis.anomaly_types.items() if share > 0 and name != "normal"]
    types = list(dict.fromkeys([*trained, *LOCAL]))
    room = config.cache_mb - train_set.cached.megabytes
    cached = CachedImages(images, train_set.rules, train_set.preprocessing, room)
    return HeldOutSet(cached, train_set.synthesis, types, train_set.seed, parts)


def build_realnet_test_set(config: EasyDict, class_name: str) -> RealNetTestSet:
    """Build the test set of a class from a realnet.yaml's `dataset` section; it may be empty."""
    meta_file = config.test.meta_file.replace("{}", class_name)
    root = _image_folder(config)
    images = ImageList(_listed(config, meta_file, may_be_empty=True), Path(root))
    return RealNetTestSet(images, preprocessing_of(config))


def foreground_rules(
    config: EasyDict, images: ImageList, preprocessing: Preprocessing
) -> dict[str, ForegroundRule | None]:
    """The foreground rule of each class, as `dataset.foreground` says; None: the whole image is foreground."""

    def examples(clsname: str) -> list[np.ndarray]:
        indices = images.of_class(clsname)
        step = max(1, len(indices) // AUTO_IMAGES)
        return [preprocessing.read(images.path(i)) for i in indices[::step][:AUTO_IMAGES]]

    return {
        name: rule_for(config.foreground, config.type, name, lambda name=name: examples(name))
        for name in class_names(images.samples)
    }


def check_realnet_data(config: EasyDict, class_name: str) -> None:
    """Check the lists and folders that a class of a realnet.yaml needs, without opening the images."""
    train = config.train
    samples = _listed(config, train.meta_file.replace("{}", class_name))
    _listed(config, config.test.meta_file.replace("{}", class_name), may_be_empty=True)
    classes = class_names(samples)
    _synthesis(config).open(classes)
    if train.validation_fraction:
        parts_of(train.parts, [sample.filename for sample in samples])
    if config.foreground != "auto":
        for name in classes:
            rule_for(config.foreground, config.type, name, list)


def _synthesis(config: EasyDict) -> Synthesis:
    """Check `dataset.train` of a realnet.yaml's `dataset` section and convert it to a Synthesis."""
    train = config.train
    for name in ("sdas_transparency_range", "dtd_transparency_range"):
        if train[name][0] > train[name][1]:
            raise UsageError(f"dataset.train.{name}: {train[name]} is not a range [low, high]")
    if train.min_perlin_scale >= train.perlin_scale:
        low, high = train.min_perlin_scale, train.perlin_scale
        raise UsageError(f"dataset.train.min_perlin_scale: {low} must be below perlin_scale {high}")
    total = sum(train.anomaly_types.values())
    if abs(total - 1) > 1e-6:
        raise UsageError(f"dataset.train.anomaly_types: the probabilities add up to {total}, not 1")
    synthesis = Synthesis(
        dict(train.anomaly_types),
        train.sdas_dir,
        train.dtd_dir,
        train.sdas_transparency_range,
        train.dtd_transparency_range,
        train.min_perlin_scale,
        train.perlin_scale,
        # Where only grey is seen, colour would give the anomalies away.
        train.match_grey or config.image_reader.kwargs.color_mode == "GRAY",
        train.edit_dir,
    )
    if not any(p > 0 for name, p in synthesis.anomaly_types.items() if name != "normal"):
        raise UsageError(f"dataset.train.anomaly_types: only normal, nothing to learn from; set {WITHOUT_FOLDER}")
    return synthesis
