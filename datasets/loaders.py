"""Batch samplers and DataLoaders: the same batches for any number of workers, divided among ranks."""

from collections.abc import Iterator
from functools import partial

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.images import allow_megapixels, allowed_megapixels
from utils.distributed import Run, usable_cores
from utils.signals import outlive_signals


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), shuffled by (seed, epoch) and divided among ranks.

    Every batch is full: the first indices of the shuffled order are repeated at its end. A smaller last batch would
    weigh more than others, in gradients and above all in BatchNorm's running statistics (RRS keeps 10% of the former
    ones in a step). Only with fewer samples than batch_size is there one batch of all of them, divided among ranks
    and repeated so that each gets the same number. No batch of a rank holds a sample twice. Indices carry their epoch,
    because loader workers live through several epochs and need new random numbers in each.

    Args:
        length: number of samples.
        batch_size: per rank.
        seed: seeds the shuffling.
        epochs: how many epochs one iteration covers.

    Example:
        >>> batches = EpochBatches(length=5, batch_size=2, run=Run(0, 1, torch.device("cpu")), seed=0)
        >>> batches.set_epoch(3)
        >>> [len(batch) for batch in batches], {epoch for batch in batches for epoch, _ in batch}
        ([2, 2, 2], {3})
    """

    def __init__(self, length: int, batch_size: int, run: Run, seed: int, epochs: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.epochs = length, batch_size, seed, epochs
        self.rank, self.world_size = run.rank, run.world_size
        self.epoch, self.skip = 0, 0
        per_rank = -(-length // run.world_size)
        self.batches_in_epoch = -(-per_rank // batch_size)
        self.batch_length = batch_size if length >= batch_size else per_rank

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch, and how many of its first batches to skip because a resumed run has already used them."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return max(0, self.epochs * self.batches_in_epoch - self.skip)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.epoch, self.epoch + self.epochs):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
            first = self.skip if epoch == self.epoch else 0
            for batch in range(first, self.batches_in_epoch):
                start = (batch * self.world_size + self.rank) * self.batch_length
                yield [(epoch, order[i % self.length]) for i in range(start, start + self.batch_length)]


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
    # More workers than cores slow each other down; results do not depend on the number of workers.
    workers = min(workers, usable_cores())
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=run.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=partial(_start_worker, allowed_megapixels()),
        # The loader draws worker seeds from this generator; using torch's global one would change later draws.
        generator=torch.Generator(),
    )


def _start_worker(megapixels: float, worker: int) -> None:
    del worker
    # Where workers are not copies of this process, they do not have its limit.
    allow_megapixels(megapixels)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    outlive_signals()
