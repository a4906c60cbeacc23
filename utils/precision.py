"""Mixed precision: what the setting `amp` and the option --precision mean on a device, and the autocast context."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import nn

from utils.choices import BF16, FORWARD_PRECISIONS, FP16, FP32, PRECISIONS
from utils.errors import UsageError

_DTYPES = {"off": None, FP32: None, BF16: torch.bfloat16, FP16: torch.float16}


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


def training_precision(trainer: EasyDict, device: torch.device) -> str:
    """Resolve `trainer.amp` to "off", "bf16" or "fp16"; the reference's `use_fp16` means fp16 if amp is off."""
    return resolve_precision("fp16" if trainer.get("use_fp16") and trainer.amp == "off" else trainer.amp, device)


def check_forward_precision(precision: str, device: torch.device) -> None:
    """Try a convolution in a precision of FORWARD_PRECISIONS: not every device and version of torch has all of them.

    Raises:
        UsageError: no such precision, or not on this device.
    """
    if precision not in FORWARD_PRECISIONS:
        raise UsageError(f"precision {precision!r} is not one of {', '.join(FORWARD_PRECISIONS)}")
    if precision == FP32:
        return
    try:
        with torch.inference_mode(), autocast(device, precision):
            F.conv2d(torch.zeros(1, 1, 3, 3, device=device), torch.zeros(1, 1, 3, 3, device=device))
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0][:150]
        raise UsageError(
            f"--precision {precision}: {device.type} has no convolutions in it ({reason}); use {FP32}"
        ) from None


def precision_in(content: dict[str, Any], where: str) -> str:
    """The precision that scores in a file were measured in; fp32 if it does not say so, as in earlier versions.

    Raises:
        UsageError: no such precision.
    """
    precision = content.get("precision", FP32)
    if precision not in FORWARD_PRECISIONS:
        known = ", ".join(FORWARD_PRECISIONS)
        raise UsageError(f"{where}: precision {str(precision)[:40]!r} is not one of {known}; evaluate the model again")
    return precision


def cast_weights(network: nn.Module, precision: str) -> None:
    """Cast the weights of convolutions and linear layers in place, once, as autocast does in every forward pass.

    The results stay the same, bit for bit; the network cannot be trained any more, nor run outside of autocast. Half a
    billion weights take a third of the time of inference to cast.

    Args:
        precision: of the autocast that the network will run in.
    """
    dtype = _DTYPES[precision]
    if dtype is None:
        return
    for module in network.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            module.to(dtype)


def autocast(device: torch.device, precision: str) -> Any:
    """A context that runs a forward pass in a precision: "off" or "fp32", "bf16", "fp16"."""
    dtype = _DTYPES[precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
