"""Device and ranks: determined here once, and passed on as a Run."""

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from utils.config import changed_settings
from utils.errors import RunError, UsageError
from utils.launcher import end_with_launcher, launched_ranks
from utils.watchdog import Watchdog

# How long ranks may take to start, and how long they wait for each other afterwards. The latter is long, because GPUs
# may differ and rank 0 has work of its own (metrics, pictures). It need not find lost ranks: a rank that ends closes
# its connections, and its launcher ends the others; one that is stopped is found by its silence (utils/watchdog.py).
START_TIMEOUT = timedelta(minutes=5)
TIMEOUT = timedelta(days=2)
WAITING_SECONDS = 10.0  # after which a rank says that it waits for others


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
    try:
        world_size, rank, _ = launched_ranks()
    except UsageError:
        return True
    return world_size == 1 or rank == 0


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


def usable_cores() -> int:
    """The number of cores that this process may use; a job scheduler may grant fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def session(device: str | None = None, same: dict[str, Any] | None = None) -> Iterator[Run]:
    """Set up device and process group from the launcher's environment; tear them down at the end, even after errors.

    Args:
        device: "cpu", "cuda", "mps", or None for the best available.
        same: what has to be the same on all ranks (run_record.identity_of).

    Raises:
        UsageError: the environment describes ranks, but not completely; the device is missing; or ranks differ.
        RunError: the other ranks did not come.
    """
    world_size, rank, local_rank = launched_ranks()
    picked = pick_device(device, local_rank)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if world_size > 1:
        # gloo carries the Python objects and CPU tensors, nccl the gradients.
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        end_with_launcher()
        _meet(backend, rank, world_size)
    watchdog = Watchdog(rank, world_size) if world_size > 1 else None
    try:
        require_same(same or {})
        yield Run(rank, world_size, picked)
        barrier()
    finally:
        if watchdog is not None:
            watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(backend: str, rank: int, world_size: int) -> None:
    address, minutes = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", START_TIMEOUT.total_seconds() / 60
    text = f"rank {rank}: waiting for {world_size} ranks at {address}, for up to {minutes:g} minutes"
    notice = threading.Timer(WAITING_SECONDS, print, [text], {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=START_TIMEOUT))
        present = dist.PrefixStore("present", store)
        present.set(str(rank), "")
        present.wait([str(other) for other in range(world_size)], START_TIMEOUT)
    # torch raises DistError, or another RuntimeError if the address cannot be resolved, for instance.
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"rank {rank} has not met all {world_size} ranks at {address} ({str(error).splitlines()[0][:200]}); "
            "start them with torchrun, or unset WORLD_SIZE to run one process"
        ) from error
    finally:
        notice.cancel()
    store.set_timeout(TIMEOUT)
    dist.init_process_group(
        backend, store=dist.PrefixStore("ranks", store), rank=rank, world_size=world_size, timeout=TIMEOUT
    )


def require_same(what: dict[str, Any]) -> None:
    """Compare values over ranks; all ranks have to call this together.

    Raises:
        UsageError: on every rank, if they differ; ranks that did different things would wait for each other forever.
    """
    if _world_size() == 1:
        return
    gathered = gather(what)
    problem = None
    for rank, other in enumerate(gathered or []):
        changes = changed_settings(gathered[0], other)
        if changes:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            problem = f"rank 0 and rank {rank} differ: {'; '.join(changes[:3])}{more}. Start all ranks alike"
            break
    problem = broadcast(problem)
    if problem:
        raise UsageError(problem)


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean over ranks of each value; all ranks have to call this together, with the same names."""
    if _world_size() == 1:
        return values
    means = all_reduce_mean(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, means.tolist(), strict=True))


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


def on_main(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 only; all ranks return its picklable result, or raise its error.

    Raises:
        UsageError, RunError: the function does.
    """
    if _world_size() == 1:
        return function()
    result, problem = None, None
    if dist.get_rank() == 0:
        try:
            result = function()
        except (UsageError, RunError) as error:
            problem = error
    result, problem = broadcast((result, problem))
    if problem is not None:
        raise problem
    return result


def barrier() -> None:
    """Wait for all ranks."""
    # A CPU tensor goes through gloo. dist.barrier would use nccl on GPUs, and occupy the GPU of a waiting rank.
    all_reduce_sum(torch.zeros(1))


def parallel(model: nn.Module, run: Run) -> nn.Module:
    """Wrap a model to train it on several ranks; with one rank, return it unchanged."""
    if run.world_size == 1:
        return model
    # Without device_ids, tensors of a batch that belong on the CPU stay there. Buffers need no broadcast: they are
    # frozen, or synchronised BatchNorm keeps them equal.
    wrapper = nn.parallel.DistributedDataParallel
    # Newer versions of torch renamed the argument.
    renamed = "forward_sync_buffers" in inspect.signature(wrapper.__init__).parameters
    buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    # Gradients are views of what is sent: one copy of them less, in memory and time.
    return wrapper(model, gradient_as_bucket_view=True, **buffers)


def no_sync(model: nn.Module, active: bool) -> Any:
    """Context in which gradients are not exchanged (for all but the last accumulated micro-batch)."""
    return model.no_sync() if active and isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient.clone())


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
        # Each rank's mean and squared deviations from it, joined as by Chan et al. (1979): sums of squares would lose
        # the variance of values far from 0.
        own_mean = flat.mean(1)
        own_deviation = (flat - own_mean[:, None]).square().sum(1)
        own = torch.stack([torch.full_like(own_mean, flat.shape[1]), own_mean, own_deviation])
        rows = [own if rank == dist.get_rank() else torch.zeros_like(own) for rank in range(_world_size())]
        counts, means, deviations = _SumOverRanks.apply(torch.stack(rows)).unbind(1)  # (ranks, channels) each
        n = counts.detach().sum(0)
        mean = means[0] + (counts * (means - means[0])).sum(0) / n
        var = (deviations.sum(0) + (counts * (means - mean).square()).sum(0)) / n
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
