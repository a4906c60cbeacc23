"""How a GPU computes and is fed: TensorFloat-32, the choice of convolution kernels, and copies that do not wait."""

import logging

import torch

log = logging.getLogger("realnet")


def use_fast_kernels(device: torch.device, tf32: bool, cudnn_benchmark: bool = False) -> None:
    """Set how a GPU multiplies float32 numbers and chooses kernels, and log it in one line; other devices stay as is.

    Args:
        tf32: round the factors of matrix products and convolutions to 10 bits of mantissa (TensorFloat-32).
        cudnn_benchmark: time cuDNN's kernels for each shape of a convolution and take the fastest. Two runs may then
            take different ones, whose results differ in the last bits.
    """
    if device.type != "cuda":
        return
    _set_tf32(tf32)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    log.info("GPU: TensorFloat-32 %s, cuDNN benchmark %s", *("on" if x else "off" for x in (tf32, cudnn_benchmark)))


def use_exact_kernels(device: torch.device) -> None:
    """Make a GPU compute in full float32. By default, torch rounds in convolutions, though not in matrix products.

    Evaluation and prediction do, so that scores and thresholds do not depend on the device by more than the order of
    summation.
    """
    if device.type == "cuda":
        _set_tf32(False)
        torch.backends.cudnn.benchmark = False


def _set_tf32(active: bool) -> None:
    # Not torch.backends.*.fp32_precision, which torch's notes recommend since 2.9: after it has been set, torch.compile
    # fails, as the compiler reads get_float32_matmul_precision (pytorch issue 166387; so in 2.14). These two set both.
    torch.set_float32_matmul_precision("high" if active else "highest")
    torch.backends.cudnn.allow_tf32 = active


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device; from the CPU, while a GPU works on.

    From memory that is not pinned, a copy waits until the GPU has done all that came before.
    """
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)
