"""Device and ranks: determined here once, and passed on as a Run."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
from torch import nn

from utils.errors import RunError, UsageError

TIMEOUT = timedelta(minutes=30)
LAUNCHER_SECONDS = 5.0
LAUNCHER_ENDED = "the launcher has ended; so does this rank"


@dataclass(frozen=True)
class Run:
    """Where a script runs.

    Args:
        rank: number of this process. world_size: how many processes run together.
        device: where tensors live.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def is_main() -> bool:
    """Whether this process is rank 0; also known before the process group exists."""
    return int(os.environ.get("RANK", 0)) == 0


def pick_device(wanted: str | None = None, local_rank: int = 0) -> torch.device:
    """The device with this name ("cpu", "cuda", "mps"), or the best one available for None.

    Raises:
        UsageError: this machine does not have it.
    """
    if wanted is None:
        if torch.cuda.is_available():
            wanted = "cuda"
        elif torch.backends.mps.is_available():
            wanted = "mps"
        else:
            wanted = "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: no CUDA device is visible to PyTorch; use --device cpu")
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} visible")
        return torch.device("cuda", local_rank)
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: not available on this machine; use --device cpu")
    return torch.device(wanted)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of tensors on the GPU, or of this process on a CPU (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # In KiB on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def session(device: str | None = None) -> Iterator[Run]:
    """Set up device and process group from the launcher's environment; tear them down at the end, even after errors.

    Args:
        device: "cpu", "cuda", "mps", or None for the best available.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    picked = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if world_size > 1:
        # gloo carries the Python objects and CPU tensors, nccl the gradients.
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        _end_with_launcher()
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Run(rank, world_size, picked)
        if world_size > 1:
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_with_launcher() -> None:
    """End this rank when its launcher is killed; otherwise it would wait for the other ranks until TIMEOUT.

    A thread does this, because Python runs no signal handlers while the main thread is blocked in a collective.

    Raises:
        RunError: the launcher ended while this rank was starting.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LAUNCHER_SECONDS)
        print(f"error: {LAUNCHER_ENDED}", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # If the launcher died before getppid() was read, its store no longer answers.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not _store_answers():
        raise RunError(LAUNCHER_ENDED)


def _store_answers() -> bool:
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + LAUNCHER_SECONDS
    while True:
        try:
            socket.create_connection(address, timeout=LAUNCHER_SECONDS).close()
            return True
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.5)


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error means that another rank has ended."""
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "socket closed", "Socket Timeout")
    return isinstance(error, dist.DistError) or any(text.lower() in str(error).lower() for text in texts)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Average a tensor over ranks, in place."""
    if _world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= _world_size()
    return tensor


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks, in place."""
    if _world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """The maximum of a tensor over ranks, in place."""
    if _world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def broadcast(value: Any) -> Any:
    """Return the picklable value of rank 0 on every rank."""
    if _world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: Any) -> list[Any] | None:
    """On rank 0, return the picklable values of all ranks, in rank order; on other ranks, None."""
    if _world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * _world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def barrier() -> None:
    """Wait for all ranks."""
    if _world_size() > 1:
        dist.barrier()


def parallel(model: nn.Module, run: Run) -> nn.Module:
    """Wrap a model to train it on several ranks; with one rank, return it unchanged."""
    if run.world_size == 1:
        return model
    # Without device_ids, tensors of a batch that belong on the CPU stay there. Buffers need no broadcast: they are
    # frozen, or synchronised BatchNorm keeps them equal.
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def no_sync(model: nn.Module, active: bool) -> Any:
    """Context in which gradients are not exchanged (for all but the last accumulated micro-batch)."""
    return model.no_sync() if active and isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


class _GlooBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with training statistics over all ranks, for CPUs, which torch's SyncBatchNorm does not support."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "_GlooBatchNorm":
        """A layer with the same tensors, under the same names."""
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.affine).train(norm.training)
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            setattr(layer, name, tensor)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        flat = x.float().transpose(0, 1).flatten(1)
        count = torch.full_like(flat[:, :1], flat.shape[1])
        sums = torch.cat([flat.sum(1, keepdim=True), (flat**2).sum(1, keepdim=True), count], dim=1)
        total = dist_fn.all_reduce(sums) if x.requires_grad else all_reduce_sum(sums)
        mean, n = total[:, 0] / total[:, 2], total[0, 2]
        var = (total[:, 1] / n - mean**2).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * n / (n - 1).clamp(min=1), self.momentum)
        out = (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()
        return out * self.weight[:, None, None] + self.bias[:, None, None] if self.affine else out


def synchronize_batchnorm(model: nn.Module, run: Run) -> nn.Module:
    """Make the model's BatchNorm layers compute statistics over all ranks; tensors keep their values and names."""
    if run.world_size == 1:
        return model
    if run.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, _GlooBatchNorm.of(child))
    return model
