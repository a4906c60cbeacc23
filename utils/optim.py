"""Optimiser steps of the training scripts: accumulation, clipping, skipped steps, EMA."""

import copy
import inspect
import logging
import math
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import nn

from utils.checkpoint import tensor_problem
from utils.config import MOST, did_you_mean, shortened
from utils.counts import counted
from utils.distributed import all_reduce_max
from utils.errors import RunError, UsageError

log = logging.getLogger("realnet")

# Not SGD: if its first step is skipped, the fused kernel leaves a momentum that was never initialised.
FUSED, FUSED_DEVICES = ("Adam", "AdamW"), ("cpu", "cuda")


def build_optimizer(section: EasyDict, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Build the optimiser that trainer.optimizer names for a model's trainable parameters; fused if possible.

    A fused optimiser makes its step in one kernel, and with GPUs decides there whether to skip it.

    Raises:
        UsageError: torch.optim has no optimiser of that name, or it does not take the arguments.
    """
    optimizer_class = _optimizer_class(section.type)
    kwargs = dict(section.kwargs)
    _check_arguments(optimizer_class, kwargs)
    # torch refuses fused together with foreach.
    if device.type in FUSED_DEVICES and section.type in FUSED and not kwargs.get("foreach"):
        kwargs.setdefault("fused", True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        return optimizer_class(parameters, **kwargs)
    except (TypeError, ValueError) as error:
        raise UsageError(f"trainer.optimizer.kwargs: {error}") from None


def check_optimizer(section: EasyDict) -> None:
    """Refuse an optimiser that cannot train a network, by a step of a small one.

    Raises:
        UsageError: see build_optimizer; or a step needs a closure or other gradients than ours, or ends in values that
            are not finite.
    """
    probe = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    optimizer = build_optimizer(section, probe, torch.device("cpu"))
    for parameter in probe.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    try:
        optimizer.step()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "Adam, AdamW and SGD are common"
        text = f"trainer.optimizer.type: {section.type} with these kwargs cannot make a step ({reason}); {advice}"
        raise UsageError(text) from None
    if not all(bool(parameter.isfinite().all()) for parameter in probe.parameters()):
        raise UsageError("trainer.optimizer.kwargs: a step with these values gives weights that are not finite")


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)) or found is torch.optim.Optimizer:
        raise UsageError(f"trainer.optimizer.type: torch.optim has no {name!r}; Adam, AdamW and SGD are common")
    return found


# (lowest, whether it may be reached, highest, whether it may be reached) of arguments that torch does not check, or
# not wholly.
_BOUNDS = {
    "lr": (0, False, 1e4, True),
    "weight_decay": (0, True, 1e6, True),
    "eps": (0, False, 1, True),
    "momentum": (0, True, 1, False),
    "betas": (0, True, 1, False),
}


# Arguments that have to be False, and what they would do.
_HARMFUL = {
    "maximize": "would make the loss as large as possible",
    "differentiable": "is for gradients through the steps, which nothing here takes",
}


def _check_arguments(optimizer_class: type, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of another kind than the optimiser's defaults, or out of bounds."""
    parameters = inspect.signature(optimizer_class).parameters
    for name, value in kwargs.items():
        where, default = f"trainer.optimizer.kwargs.{name}", getattr(parameters.get(name), "default", None)
        if name not in parameters or name == "params":
            hint = did_you_mean(name, parameters)
            raise UsageError(f"{where[:100]} is not an argument of torch.optim.{optimizer_class.__name__}{hint}")
        if name in _HARMFUL and value is not False:
            raise UsageError(f"{where}: {shortened(value)} {_HARMFUL[name]}; leave it out")
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise UsageError(f"{where}: {shortened(value)} is not True or False")
        elif isinstance(default, tuple):
            if not isinstance(value, (list, tuple)) or len(value) != len(default):
                raise UsageError(f"{where}: {shortened(value)} is not a list of {len(default)} numbers")
            for number in value:
                _check_number(where, number, *_BOUNDS.get(name, ()))
        elif isinstance(default, (int, float)) or name == "lr":
            _check_number(where, value, *_BOUNDS.get(name, ()))
        elif value is not None and not isinstance(value, (bool, int, float)):
            raise UsageError(f"{where}: {shortened(value)} is not a number, True, False or null")


def _check_number(
    where: str, value: Any, low: float = -math.inf, at_low: bool = True, high: float = math.inf, at_high: bool = True
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or (isinstance(value, int) and abs(value) > MOST) or not math.isfinite(value):
        raise UsageError(f"{where}: {shortened(value)} is not a finite number")
    if value < low or (value == low and not at_low):
        raise UsageError(f"{where}: {value!r} has to be {'at least' if at_low else 'above'} {low:g}")
    if value > high or (value == high and not at_high):
        raise UsageError(f"{where}: {value!r} has to be {'at most' if at_high else 'below'} {high:g}")


def learning_rate_factor(schedule: dict, step: int, steps: int) -> float:
    """What a schedule multiplies the learning rate by at an optimiser step.

    During the first warmup_steps steps it rises linearly to 1. Then it stays there (constant), or falls along half a
    cosine to 0 (Loshchilov and Hutter 2017, without restarts).

    Args:
        schedule: the settings {type, warmup_steps}.
        step: finished steps.
        steps: of the whole training.

    Example:
        >>> cosine = {"type": "cosine", "warmup_steps": 2}
        >>> [round(learning_rate_factor(cosine, step, 6), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    warmup = schedule["warmup_steps"]
    if step < warmup:
        return (step + 1) / warmup
    if schedule["type"] == "constant":
        return 1.0
    return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))) / 2


class Stepper:
    """Makes one optimiser step from one or several backward passes.

    If the loss or the gradients are not finite on any rank, the step is skipped and counted: weights, optimiser state
    and BatchNorm's running statistics stay as they were. With a fused optimiser, this does not wait for the GPU.

    Args:
        model: the model whose gradients are clipped, wrapped for several ranks or not.
        optimizer: optimiser of the model's parameters, with the learning rates of the settings.
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
        self.learning_rates = [group["lr"] for group in optimizer.param_groups]
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

    def step(self, factor: float = 1.0) -> None:
        """Clip once, step if everything is finite, and clear the gradients.

        Args:
            factor: of the learning rates of the settings, see learning_rate_factor.
        """
        for group, learning_rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = learning_rate * factor
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
                f"the loss was not finite in {counted(count, 'step')} in a row (trainer.max_bad_steps: "
                f"{self.max_bad_steps}); {state}. Lower the learning rate, or set trainer.amp: off"
            )

    def check_epoch(self, steps: int) -> None:
        """End the run if it skipped all of the last `steps` steps, those of an epoch; 0 steps end nothing.

        Raises:
            RunError: it did, so nothing was trained.
        """
        count = int(self.bad_in_a_row)
        if count >= steps > 0:
            raise RunError(
                f"the loss was not finite in any of the {counted(count, 'step')} of the epoch, so nothing was trained; "
                "lower the learning rate, check the criterion, or set trainer.amp: off"
            )

    @property
    def lacks_state(self) -> bool:
        """Whether the optimiser keeps moments and the like, but has none, as before its first step."""
        return bool(_state_keys(self.optimizer)) and not self.optimizer.state

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state["optimizer"], dict) or not isinstance(state["optimizer"]["state"], dict):
            raise ValueError("the optimiser's state is not a mapping")
        missing = _state_keys(self.optimizer) - _keys_of(state["optimizer"])
        if missing and state["optimizer"]["state"]:
            name = type(self.optimizer).__name__
            raise ValueError(
                f"trainer.optimizer: {name} with these kwargs keeps {', '.join(sorted(missing))}, which the saved "
                "optimiser does not; go on with the earlier optimiser, or start anew with --overwrite"
            )
        unused = _keys_of(state["optimizer"]) - _state_keys(self.optimizer)
        if unused:
            log.info("  %s does not use the saved %s", type(self.optimizer).__name__, ", ".join(sorted(unused)))
        self._check_shapes(state["optimizer"])
        # The settings of this run apply, so that a resumed run can have a lower learning rate; and before loading, as
        # a fused optimiser keeps its step counts on the GPU.
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        own = [{**group, "lr": lr} for group, lr in zip(own, self.learning_rates, strict=True)]
        groups = [{**saved, **new} for saved, new in zip(state["optimizer"]["param_groups"], own, strict=True)]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self._lay_out_state()
        self.scaler.load_state_dict(state["scaler"])
        self._keep_statistics()

    def _lay_out_state(self) -> None:
        """Give the loaded values the memory layout of their parameters, which trainer.channels_last may have changed.

        Fused kernels go through memory without regard to strides: on a GPU they would refuse, on a CPU mix up values.
        """
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _check_shapes(self, state: dict[str, Any]) -> None:
        """Refuse values of other shapes than their parameters have; torch finds them only at the next step, if ever."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = _kept_state(self.optimizer)
        for number, values in state["state"].items():
            if not isinstance(number, int) or not 0 <= number < len(parameters):
                raise ValueError(f"the optimiser's state has no parameter {shortened(number)}")
            for name, value in values.items():
                problem = _state_problem(name, value, kept.get(name), parameters[number].shape)
                if problem:
                    raise ValueError(f"the optimiser's {name} of parameter {number} {problem}")


def _state_problem(name: str, value: Any, own: Any, shape: torch.Size) -> str | None:
    """Why a saved value cannot be part of an optimiser's state; None if it can.

    Args:
        own: what this optimiser keeps under that name, see _kept_state; None if nothing.
        shape: of the parameter.
    """
    if torch.is_tensor(own) and own.dim() and not torch.is_tensor(value):
        return f"is {shortened(value)}, not a tensor"
    if torch.is_tensor(value):
        scalar = not (torch.is_tensor(own) and own.dim())
        allowed = (shape, torch.Size([])) if own is None else (torch.Size([]) if scalar else shape,)
        problem = tensor_problem(value, torch.float32)
        if problem or value.shape not in allowed:
            return problem or f"has the shape {list(value.shape)}, not {list(allowed[0])}"
        finite, negative = bool(value.isfinite().all()), scalar and bool((value < 0).any())
    else:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return f"is {shortened(value)}"
        finite, negative = value is None or math.isfinite(value), value is not None and value < 0
    if not finite:
        return "holds values that are not finite"
    return "counts below 0" if name == "step" and negative else None


def _state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """The names of what an optimiser keeps per parameter."""
    return set(_kept_state(optimizer))


def _kept_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimiser keeps per parameter, found by one step of another one with the same arguments."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros(2, 2)
    names = inspect.signature(type(optimizer).__init__).parameters
    kwargs = {name: value for name, value in optimizer.defaults.items() if name in names and name != "fused"}
    probe = type(optimizer)([parameter], **kwargs)
    probe.step()
    return {name: value for name, value in probe.state[parameter].items() if value is not None}


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
        for name, total in (("total", self.total), ("steps", self.steps)):
            if not isinstance(state[name], (int, float)) or not math.isfinite(state[name]):
                raise ValueError(f"epoch_loss.{name} is {shortened(state[name])}, not a finite number")
            total.fill_(state[name])


class EMA:
    """Exponential moving average of a model's parameters, warmed up.

    At step k the decay is min(decay, (1 + k) / (10 + k)). Otherwise, the random weights at the start would stay in the
    average for about 1 / (1 - decay) steps. Frozen parameters are as they were at the start.

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
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        averages, values = zip(*((a, p) for a, p in pairs if p.requires_grad), strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
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
