"""DataLoaders: the same batches for any number of workers, and shared over ranks."""

import logging
import os
from collections.abc import Iterator
from itertools import cycle, islice

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.foreground import foreground_of
from datasets.images import COLOR_MODES
from datasets.lists import Sample, class_names, read_list
from datasets.realnet import Appearance, RealNetTestSet, RealNetTrainSet, Synthesis
from datasets.sdas import SDASDataset
from utils.distributed import Run
from utils.errors import UsageError
from utils.signals import outlive_signals

log = logging.getLogger("realnet")


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), shuffled by (seed, epoch), shared over ranks.

    The last indices are filled up with the epoch's first so that every rank has as many, also where there are fewer
    samples than ranks. The epoch travels with the
    index, so that loader workers that outlive an epoch draw anew in each.

    Args:
        length: number of samples.
        batch_size: per rank.
        seed: of the shuffling.
        epochs: how many epochs one iteration covers.
    """

    def __init__(self, length: int, batch_size: int, run: Run, seed: int, epochs: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.epochs = length, batch_size, seed, epochs
        self.rank, self.world_size = run.rank, run.world_size
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch, and how many of its first batches are left out (those that a resumed run has had)."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        per_rank = -(-self.length // self.world_size)
        return max(0, self.epochs * -(-per_rank // self.batch_size) - self.skip)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.epoch, self.epoch + self.epochs):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
            order = list(islice(cycle(order), -(-self.length // self.world_size) * self.world_size))
            mine = order[self.rank :: self.world_size]
            first = self.skip * self.batch_size if epoch == self.epoch else 0
            for start in range(first, len(mine), self.batch_size):
                yield [(epoch, index) for index in mine[start : start + self.batch_size]]


class SharedBatches(Sampler[list[int]]):
    """Every index once, in batches that are the same for any number of ranks; rank r takes batches r, r + world, ..."""

    def __init__(self, length: int, batch_size: int, run: Run) -> None:
        self.starts = range(0, length, batch_size)[run.rank :: run.world_size]
        self.length, self.batch_size = length, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, min(start + self.batch_size, self.length)))


def make_loader(dataset: Dataset, batches: Sampler, workers: int, run: Run) -> DataLoader:
    """A DataLoader whose workers stay alive between epochs."""
    # More workers than cores slow each other down; no setting of results depends on their number.
    workers = min(workers, os.cpu_count() or 1)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=run.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        # Of its own: the loader draws seeds, more or fewer by the number of workers, which must not move torch's.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    del worker
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    outlive_signals()


# ---- from the settings -----------------------------------------------------------------------------------------------


def _size(config: dict) -> tuple[int, int]:
    size = config.input_size
    if len(size) != 2 or min(size) < 1:
        raise UsageError(f"dataset.input_size: {size} is not [height, width]")
    return int(size[0]), int(size[1])


def _color_mode(config: dict) -> str:
    mode = config.image_reader.kwargs.color_mode
    if mode not in COLOR_MODES:
        raise UsageError(f"dataset.image_reader.kwargs.color_mode: {mode!r} is not one of {', '.join(COLOR_MODES)}")
    return mode


def _augmentations(section: dict) -> dict[str, bool]:
    return {name: section[name] for name in ("hflip", "vflip", "rotate")}


def build_sdas_dataset(config: dict, split: str, classes: list[str] | None, seed: int) -> SDASDataset:
    """The pictures of a diffusion.yaml or classifier.yaml.

    Args:
        config: its `dataset` section.
        split: "train" or "test"; of the test list only good pictures are used, and where it has none, training ones.
        classes: class names in order of their numbers, or None to take them from the list.
    """
    section, root = config[split], config.image_reader.kwargs.image_dir
    samples = _good_samples(section.meta_file, root, classes, may_be_empty=split == "test")
    if not samples and split == "test":
        log.info("%s: holds no good picture, so training pictures are shown and tested on", section.meta_file)
        samples = _good_samples(config.train.meta_file, root, classes)
    if classes is None:
        classes = class_names(samples)
    if not samples:
        raise UsageError(
            f"{section.meta_file}: holds no good picture" + (f" of {', '.join(classes)}" if classes else "")
        )
    augmentations = _augmentations(section) if split == "train" else {}
    cache = config.cache_mb if split == "train" else 0
    size, mode = _size(config), _color_mode(config)
    return SDASDataset(samples, root, classes, size, seed, **augmentations, cache_mb=cache, color_mode=mode)


def check_sdas_list(config: dict, split: str, network: str) -> None:
    """Check a list of a diffusion.yaml or classifier.yaml, without opening its pictures.

    Args:
        network: the section whose class_number has to suffice, "unet" or "classifier".
    """
    _color_mode(config.dataset)
    path, root = config.dataset[split].meta_file, config.dataset.image_reader.kwargs.image_dir
    samples = _good_samples(path, root, None, may_be_empty=split == "test")
    if not samples and split == "train":
        raise UsageError(f"{path}: holds no good picture")
    classes, most = class_names(samples), config[network].class_number
    if len(classes) > most:
        raise UsageError(f"{network}.class_number: {most}, but {path} has {len(classes)} classes")


def check_realnet_data(config: dict, class_name: str) -> None:
    """Check the lists and folders that a class of a realnet.yaml needs, without opening the pictures."""
    train, root = config.train, config.image_reader.kwargs.image_dir
    _color_mode(config)
    samples = read_list(train.meta_file.replace("{}", class_name), root)
    read_list(config.test.meta_file.replace("{}", class_name), root, may_be_empty=True)
    synthesis = _synthesis(train)
    classes = class_names(samples)
    synthesis.open(classes)
    if config.foreground != "auto":
        for name in classes:
            foreground_of(config.foreground, config.type, name, list)


def _synthesis(train: dict) -> Synthesis:
    """The `dataset.train` section of a realnet.yaml."""
    for name in ("sdas_transparency_range", "dtd_transparency_range"):
        if train[name][0] > train[name][1]:
            raise UsageError(f"dataset.train.{name}: {train[name]} is not a range [low, high]")
    if train.min_perlin_scale >= train.perlin_scale:
        low, high = train.min_perlin_scale, train.perlin_scale
        raise UsageError(f"dataset.train.min_perlin_scale: {low} has to be below perlin_scale {high}")
    synthesis = Synthesis(
        dict(train.anomaly_types),
        train.sdas_dir,
        train.dtd_dir,
        train.sdas_transparency_range,
        train.dtd_transparency_range,
        train.min_perlin_scale,
        train.perlin_scale,
    )
    if not any(p > 0 for name, p in synthesis.anomaly_types.items() if name != "normal"):
        raise UsageError("dataset.train.anomaly_types: without sdas or dtd there is nothing to learn from")
    return synthesis


def _good_samples(path: str, image_dir: str, classes: list[str] | None, may_be_empty: bool = False) -> list[Sample]:
    samples = read_list(path, image_dir, may_be_empty)
    return [s for s in samples if s.label == 0 and (classes is None or s.clsname in classes)]


def appearance_of(config: dict) -> Appearance:
    """How a realnet.yaml's `dataset` section turns pictures into tensors."""
    return Appearance(_size(config), tuple(config.pixel_mean), tuple(config.pixel_std), _color_mode(config))


def build_realnet_train_set(config: dict, class_name: str, seed: int) -> RealNetTrainSet:
    """The training pictures of a class, from a realnet.yaml's `dataset` section."""
    train, root = config.train, config.image_reader.kwargs.image_dir
    path = train.meta_file.replace("{}", class_name)
    samples = [sample for sample in read_list(path, root) if sample.label == 0]
    if not samples:
        raise UsageError(f"{path}: holds no good picture")
    synthesis = _synthesis(train)
    return RealNetTrainSet(
        samples,
        root,
        config.type,
        config.foreground,
        appearance_of(config),
        synthesis,
        seed,
        **_augmentations(train),
        cache_mb=config.cache_mb,
    )


def build_realnet_test_set(config: dict, class_name: str) -> RealNetTestSet:
    """The test pictures of a class, from a realnet.yaml's `dataset` section; there may be none."""
    root = config.image_reader.kwargs.image_dir
    samples = read_list(config.test.meta_file.replace("{}", class_name), root, may_be_empty=True)
    return RealNetTestSet(samples, root, appearance_of(config))
