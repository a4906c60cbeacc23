"""Optimiser steps of the training scripts: accumulation, clipping, skipped steps, EMA."""

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.config import call_with_settings
from utils.distributed import all_reduce_max
from utils.errors import RunError, UsageError


def build_optimizer(section: dict, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Build the optimiser that trainer.optimizer names for a model's trainable parameters; fused on a GPU if possible.

    Raises:
        UsageError: torch.optim has no optimiser of that name, or it does not take the arguments.
    """
    optimizer_class = getattr(torch.optim, section.type, None)
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise UsageError(f"trainer.optimizer.type: torch.optim has no {section.type!r}; Adam, AdamW and SGD are common")
    kwargs = dict(section.kwargs)
    for name in ("lr", "weight_decay"):
        value = kwargs.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UsageError(f"trainer.optimizer.kwargs.{name}: {value!r} is not a finite number")
    if device.type == "cuda" and section.type in ("Adam", "AdamW", "SGD"):
        kwargs.setdefault("fused", True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        return call_with_settings("trainer.optimizer.kwargs", optimizer_class, parameters, **kwargs)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"trainer.optimizer.kwargs: {error}") from None


class Stepper:
    """Makes one optimiser step from one or several backward passes.

    If the loss or the gradients are not finite on any rank, the step is skipped and counted: weights, optimiser state
    and BatchNorm's running statistics stay as they were. With a fused optimiser, this does not wait for the GPU.

    Args:
        model: the model whose gradients are clipped, wrapped for several ranks or not.
        optimizer: optimiser of the model's parameters.
        precision: "fp16" scales the loss.
        clip_max_norm: largest gradient norm; None does not clip.
        max_bad_steps: how many steps in a row may be skipped, see check.

    Attributes:
        bad_steps, bad_in_a_row: numbers of skipped steps, as tensors on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: str,
        clip_max_norm: float | None,
        max_bad_steps: int = 20,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.clip_max_norm, self.max_bad_steps = clip_max_norm, max_bad_steps
        device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type == "cuda")
        self.bad = torch.zeros((), device=device)
        self.bad_steps, self.bad_in_a_row = torch.zeros((), device=device), torch.zeros((), device=device)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self._keep_statistics()

    def backward(self, loss: torch.Tensor) -> None:
        self.bad += ~loss.detach().isfinite()
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """Clip once, step if everything is finite, and clear the gradients."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # fp16 gradients overflow regularly until the scaler has found its scale; it skips these steps itself.
        if not self.scaler.is_enabled():
            self.bad += ~norm.isfinite()
        bad = (all_reduce_max(self.bad) > 0).float()
        if self.clip_max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_max_norm, norm)
        self._step_unless(bad)
        for statistic, backup in zip(self.statistics, self.backups, strict=True):
            statistic.copy_(torch.where(bad > 0, backup, statistic))
        self._keep_statistics()
        self.bad_steps += bad
        self.bad_in_a_row.add_(1).mul_(bad)
        self.bad.zero_()
        self.optimizer.zero_grad(set_to_none=True)

    def _step_unless(self, bad: torch.Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.param_groups[0].get("fused"):
            # As GradScaler does: the fused kernel reads found_inf on the device and then skips the step.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()

    def _keep_statistics(self) -> None:
        """Back up the running statistics: the next forward pass changes them before its loss is known."""
        self.backups = [statistic.clone() for statistic in self.statistics]

    def check(self, checkpoint: Path) -> None:
        """End the run if it no longer makes progress; this waits for the device.

        Args:
            checkpoint: the last good one, for the error message.

        Raises:
            RunError: more than max_bad_steps steps in a row were skipped.
        """
        count = int(self.bad_in_a_row)
        if count > self.max_bad_steps:
            state = f"the last good state is in {checkpoint}" if checkpoint.is_file() else "no state was saved before"
            raise RunError(
                f"the loss was not finite in {count} steps in a row (trainer.max_bad_steps: {self.max_bad_steps}); "
                f"{state}. Lower the learning rate, or set trainer.amp: off"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing = _state_keys(self.optimizer) - _keys_of(state["optimizer"])
        if missing and state["optimizer"]["state"]:
            name = type(self.optimizer).__name__
            raise ValueError(
                f"trainer.optimizer: {name} with these kwargs keeps {', '.join(sorted(missing))}, which the saved "
                "optimiser does not; go on with the earlier optimiser, or start anew with --overwrite"
            )
        # The settings of this run apply, so that a resumed run can have a lower learning rate.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.scaler.load_state_dict(state["scaler"])
        self._keep_statistics()


def _state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """What an optimiser keeps per parameter, found by one step of another one with the same arguments."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros(2, 2)
    names = inspect.signature(type(optimizer).__init__).parameters
    kwargs = {name: value for name, value in optimizer.defaults.items() if name in names and name != "fused"}
    probe = type(optimizer)([parameter], **kwargs)
    probe.step()
    return {name for name, value in probe.state[parameter].items() if value is not None}


def _keys_of(state: dict[str, Any]) -> set[str]:
    return {name for values in state["state"].values() for name, value in values.items() if value is not None}


class EpochLoss:
    """The mean loss over an epoch, kept on the device and, for resumed runs, in checkpoints."""

    def __init__(self, device: torch.device) -> None:
        self.total, self.steps = torch.zeros((), device=device), torch.zeros((), device=device)

    def reset(self) -> None:
        self.total.zero_()
        self.steps.zero_()

    def add(self, loss: torch.Tensor, share: float) -> None:
        """Add the loss of a micro-batch that makes up `share` of a step; losses that are not finite are left out."""
        finite = loss.isfinite()
        self.total += torch.where(finite, loss, 0.0) * share
        self.steps += finite * share

    def mean(self) -> float:
        """The mean over the steps of this rank."""
        return float(self.total / self.steps) if self.steps else 0.0

    def state_dict(self) -> dict[str, float]:
        return {"total": float(self.total), "steps": float(self.steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total.fill_(state["total"])
        self.steps.fill_(state["steps"])


class EMA:
    """Exponential moving average of a model's parameters, warmed up.

    At step k the decay is min(decay, (1 + k) / (10 + k)). Otherwise, the random weights at the start would stay in the
    average for about 1 / (1 - decay) steps.

    Attributes:
        model: a copy that holds the averages, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the averages after an optimiser step; `step` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state)


def accumulation_groups(batches: int, accumulate: int) -> list[int]:
    """The number of micro-batches in each optimiser step of an epoch; the last step may have fewer."""
    return [min(accumulate, batches - k * accumulate) for k in range(math.ceil(batches / accumulate))]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for an optimiser step on a rank, so that a resumed run draws the same numbers as an unbroken one."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)
