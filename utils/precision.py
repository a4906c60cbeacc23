"""Mixed precision: what the setting `amp` means on a device, and the autocast context for it."""

from contextlib import nullcontext
from typing import Any

import torch

from utils.errors import UsageError
from utils.settings import PRECISIONS


def resolve_precision(amp: str, device: torch.device) -> str:
    """Resolve the setting `amp` to "off", "bf16" or "fp16"; "auto" is bf16 if the device supports it natively.

    Raises:
        UsageError: no such precision.
    """
    if amp not in PRECISIONS:
        raise UsageError(f"amp: {amp!r} is not one of {', '.join(PRECISIONS)}")
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    # A CPU without bf16 instructions emulates it, many times slower.
    native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bf16" if native else "off"


def training_precision(trainer: dict, device: torch.device) -> str:
    """Resolve `trainer.amp` to "off", "bf16" or "fp16"; the reference's `use_fp16` means fp16 if amp is off."""
    return resolve_precision("fp16" if trainer.get("use_fp16") and trainer.amp == "off" else trainer.amp, device)


def autocast(device: torch.device, precision: str) -> Any:
    """A context that runs a forward pass in a precision: "off", "bf16" or "fp16"."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
