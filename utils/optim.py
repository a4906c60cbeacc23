"""Optimiser steps as the training scripts share them: precision, accumulation, clipping, EMA."""

import copy
import math
from typing import Any

import torch
from torch import nn

from utils.distributed import resolve_precision
from utils.errors import UsageError


def precision_of(trainer: dict, device: torch.device) -> str:
    """trainer.amp as "off", "bf16" or "fp16"; the reference's use_fp16 means fp16."""
    return resolve_precision("fp16" if trainer.get("use_fp16") and trainer.amp == "off" else trainer.amp, device)


def build_optimizer(section: dict, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser that trainer.optimizer names, over a model's trainable parameters; fused on a GPU where it can be.

    Raises:
        UsageError: torch.optim has none of that name, or it does not take those arguments.
    """
    kind = getattr(torch.optim, section.type, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UsageError(f"trainer.optimizer.type: torch.optim has no {section.type!r}; Adam, AdamW and SGD are common")
    kwargs = dict(section.kwargs)
    if device.type == "cuda" and section.type in ("Adam", "AdamW", "SGD"):
        kwargs.setdefault("fused", True)
    try:
        return kind([p for p in model.parameters() if p.requires_grad], **kwargs)
    except (TypeError, ValueError) as error:
        raise UsageError(f"trainer.optimizer.kwargs: {error}") from None


class Stepper:
    """One optimiser step out of one or several backward passes.

    Args:
        model: whose gradients are clipped; wrapped or not.
        optimizer: steps on them.
        precision: "fp16" scales the loss.
        clip_max_norm: largest gradient norm, or None.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: str, clip_max_norm: float | None
    ) -> None:
        self.model, self.optimizer, self.clip_max_norm = model, optimizer, clip_max_norm
        device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type == "cuda")

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """Clip once, step, and clear the gradients."""
        self.scaler.unscale_(self.optimizer)
        if self.clip_max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


class EMA:
    """Exponential moving average of a model's parameters, warmed up.

    After k updates the decay is min(decay, (1 + k) / (10 + k)): an average that starts from random weights would
    otherwise keep them for 1 / (1 - decay) steps.

    Attributes:
        model: a copy that holds the averages, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)


def accumulation_groups(batches: int, accumulate: int) -> list[int]:
    """Sizes of the groups of micro-batches that make the optimiser steps of an epoch; the last may be smaller."""
    return [min(accumulate, batches - k * accumulate) for k in range(math.ceil(batches / accumulate))]


def seed_all(seed: int, epoch: int, rank: int) -> None:
    """Seed torch for an epoch on a rank, so that a resumed run draws what an uninterrupted one draws."""
    torch.manual_seed((seed * 1_000_003 + epoch) * 4099 + rank)
