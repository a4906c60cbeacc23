"""Batch samplers and DataLoaders: the same batches for any number of workers, divided among ranks."""

import os
from collections.abc import Iterator
from itertools import cycle, islice

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.distributed import Run
from utils.signals import outlive_signals


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), shuffled by (seed, epoch) and divided among ranks.

    The first indices of the shuffled order are repeated at its end, so that every rank gets the same number, even with
    fewer samples than ranks. Indices carry their epoch because loader workers live through several epochs and need new
    random numbers in each.

    Args:
        length: number of samples.
        batch_size: per rank.
        seed: seeds the shuffling.
        epochs: how many epochs one iteration covers.

    Example:
        >>> batches = EpochBatches(length=5, batch_size=2, run=Run(0, 1, torch.device("cpu")), seed=0)
        >>> batches.set_epoch(3)
        >>> [len(batch) for batch in batches], {epoch for batch in batches for epoch, _ in batch}
        ([2, 2, 1], {3})
    """

    def __init__(self, length: int, batch_size: int, run: Run, seed: int, epochs: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.epochs = length, batch_size, seed, epochs
        self.rank, self.world_size = run.rank, run.world_size
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch, and how many of its first batches to skip because a resumed run has already used them."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        per_rank = -(-self.length // self.world_size)
        return max(0, self.epochs * -(-per_rank // self.batch_size) - self.skip)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.epoch, self.epoch + self.epochs):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
            order = list(islice(cycle(order), -(-self.length // self.world_size) * self.world_size))
            rank_order = order[self.rank :: self.world_size]
            first = self.skip * self.batch_size if epoch == self.epoch else 0
            for start in range(first, len(rank_order), self.batch_size):
                yield [(epoch, index) for index in rank_order[start : start + self.batch_size]]


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
    workers = min(workers, os.cpu_count() or 1)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=run.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        # The loader draws worker seeds from this generator; using torch's global one would change later draws.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    del worker
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    outlive_signals()
