"""Optimiser steps as the training scripts share them: accumulation, clipping, skipped steps, EMA."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.config import call_with_settings
from utils.distributed import all_reduce_max
from utils.errors import RunError, UsageError


def build_optimizer(section: dict, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser that trainer.optimizer names, over a model's trainable parameters; fused on a GPU where it can be.

    Raises:
        UsageError: torch.optim has none of that name, or it does not take those arguments.
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
    """One optimiser step out of one or several backward passes.

    A step whose loss or gradients are not finite on any rank is skipped and counted: weights, optimiser and the running
    statistics of BatchNorm stay as they were. Nothing of that waits for a GPU.

    Args:
        model: whose gradients are clipped; wrapped or not.
        optimizer: steps on them.
        precision: "fp16" scales the loss.
        clip_max_norm: largest gradient norm, or None.
        max_bad_steps: how many may be skipped in a row, see check.

    Attributes:
        bad_steps, bad_in_a_row: skipped steps, as tensors on the device.
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
        """Clip once, step where everything is finite, and clear the gradients."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # With fp16 gradients overflow as a matter of course while the scale is sought, and the scaler skips them.
        if not self.scaler.is_enabled():
            self.bad += ~norm.isfinite()
        bad = (all_reduce_max(self.bad) > 0).float()
        if self.clip_max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_max_norm, norm)
        self._step_unless(bad)
        for statistic, before in zip(self.statistics, self.kept, strict=True):
            statistic.copy_(torch.where(bad > 0, before, statistic))
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
            # What the scaler would hand over: the kernel looks at it on the device.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()

    def _keep_statistics(self) -> None:
        """Copy the running statistics, which the next forward pass changes before its loss is known."""
        self.kept = [statistic.clone() for statistic in self.statistics]

    def check(self, checkpoint: Path) -> None:
        """Stop a training that has gone wrong; this waits for the device.

        Args:
            checkpoint: what to name as the last good one.

        Raises:
            RunError: more than max_bad_steps steps in a row were skipped.
        """
        count = int(self.bad_in_a_row)
        if count > self.max_bad_steps:
            kept = f"the last good state is in {checkpoint}" if checkpoint.is_file() else "no state was saved before"
            raise RunError(
                f"the loss was not finite in {count} steps in a row (trainer.max_bad_steps: {self.max_bad_steps}); "
                f"{kept}. Lower the learning rate, or set trainer.amp: off"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._keep_statistics()


class EpochLoss:
    """The mean loss of an epoch's steps, kept on the device, through interruptions too."""

    def __init__(self, device: torch.device) -> None:
        self.total, self.steps = torch.zeros((), device=device), torch.zeros((), device=device)

    def reset(self) -> None:
        self.total.zero_()
        self.steps.zero_()

    def add(self, loss: torch.Tensor, share: float) -> None:
        """Add a micro-batch's loss, which counts `share` of a step; it is left out where it is not finite."""
        finite = loss.isfinite()
        self.total += torch.where(finite, loss, 0.0) * share
        self.steps += finite * share

    def mean(self) -> float:
        """On this rank."""
        return float(self.total / self.steps) if self.steps else 0.0

    def state_dict(self) -> dict[str, float]:
        return {"total": float(self.total), "steps": float(self.steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total.fill_(state["total"])
        self.steps.fill_(state["steps"])


class EMA:
    """Exponential moving average of a model's parameters, warmed up.

    At step k the decay is min(decay, (1 + k) / (10 + k)): an average that starts from random weights would otherwise
    keep them for 1 / (1 - decay) steps.

    Attributes:
        model: a copy that holds the averages, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after an optimiser step; `step` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state)


def accumulation_groups(batches: int, accumulate: int) -> list[int]:
    """Sizes of the groups of micro-batches that make the optimiser steps of an epoch; the last may be smaller."""
    return [min(accumulate, batches - k * accumulate) for k in range(math.ceil(batches / accumulate))]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for an optimiser step on a rank: a run that is resumed there draws what an unbroken one draws."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)
