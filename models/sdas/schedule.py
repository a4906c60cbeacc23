"""Noise schedules and the choice of timesteps (Ho et al. 2020; Nichol & Dhariwal 2021, arXiv 2102.09672)."""

import math
from collections.abc import Sequence

import numpy as np

from utils.counts import counted
from utils.errors import UsageError

# Of an image's variance, at the last step: 4e-5 for the linear schedule, 2e-9 for the cosine one.
LEAST_SIGNAL = 1e-20
# Where logsnrN begins, as a share of T: where ddim20 does. At more noise, x_0 = (x_t - sigma eps) / alpha multiplies
# the error of eps by hundreds (20 000 at the end of the cosine schedule): too much after a short training.
LOGSNR_START = 0.95


def beta_schedule(name: str, steps: int) -> np.ndarray:
    """Variances of the forward process.

    Args:
        name: "linear" (1e-4 .. 0.02, times 1000 / steps), "cosine" (Nichol & Dhariwal, eq. 17) or
            "const<beta>", e.g. "const0.01" (the value times 1000 / steps at every step).
        steps: number of timesteps T.

    Returns:
        (T,) float64 in (0, 1).

    Raises:
        UsageError: an unknown name, values outside (0, 1), or values so large that the last steps divide by almost 0.
    """
    scale = 1000 / steps
    if name == "linear":
        betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    elif name == "cosine":
        times = np.arange(steps + 1, dtype=np.float64) / steps
        alpha_bar = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    elif name.startswith("const"):
        try:
            # At most 1, as a value of thousands would warn about overflow.
            betas = np.full(steps, min(1.0, scale * float(name.removeprefix("const"))), dtype=np.float64)
        except ValueError:
            raise UsageError(f"beta_scheduler: {name[:40]!r} lacks its value; write e.g. const0.01") from None
    else:
        raise UsageError(f"beta_scheduler: {name[:40]!r} is not one of linear, cosine, const<beta>")
    if not ((betas > 0) & (betas < 1)).all():
        raise UsageError(f"beta_scheduler: {name[:40]!r} with T = {steps} has values outside (0, 1)")
    if np.log1p(-betas).sum() < math.log(LEAST_SIGNAL):
        text = f"{name[:40]!r} with T = {steps} leaves nothing of an image long before the last step; lower its value"
        raise UsageError(f"beta_scheduler: {text}")
    return betas


def kept_timesteps(betas: np.ndarray, section_counts: str | int | Sequence[int]) -> list[int]:
    """The timesteps that a respaced process keeps, ascending.

    Args:
        betas: (T,) of the original process.
        section_counts: "ddimN" for 0, i, 2i, ... with the smallest stride i that gives exactly N of them; "logsnrN" for
            N evenly spaced in log(alpha / sigma) from 0.95 T to 0, for DPM-Solver++; or counts ("10,10,20", a number or
            a list): the process is cut into equal sections, one per count, and each section keeps so many steps, evenly
            spaced from its first to its last.

    Raises:
        UsageError: no stride gives N steps, the process has fewer than N, or a section is shorter than its count.
    """
    steps = len(betas)
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _strided(steps, section_counts)
    if isinstance(section_counts, str) and section_counts.startswith("logsnr"):
        return _even_in_log_snr(betas, section_counts)
    try:
        parts = section_counts.split(",") if isinstance(section_counts, str) else section_counts
        parts = parts if isinstance(parts, (list, tuple)) else [parts]
        if any(isinstance(part, (bool, float)) for part in parts):
            raise ValueError("int() would cut fractions")
        counts = [int(part) for part in parts]
    except (TypeError, ValueError):
        text = f"{str(section_counts)[:60]!r} is not ddimN, logsnrN, a whole number or a list of such numbers"
        raise UsageError(f"section_counts: {text}") from None
    if not counts:
        raise UsageError("section_counts: is empty")
    size, extra = divmod(steps, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            wanted = counted(count, "step") if abs(count) < 10**9 else "that many steps"
            raise UsageError(f"section_counts: cannot keep {wanted} of a section of {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        kept += [start + round(stride * k) for k in range(count)]
        start += length
    return kept


def _strided(steps: int, section_counts: str) -> list[int]:
    wanted = _count(section_counts, "ddim")
    counts = {len(range(0, steps, stride)): stride for stride in range(steps, 0, -1)}
    if wanted not in counts:
        nearest = min(counts, key=lambda count: abs(count - wanted))
        raise UsageError(
            f"section_counts: no stride keeps exactly {str(wanted)[:20]} of {steps} steps; the nearest is ddim{nearest}"
        )
    return list(range(0, steps, counts[wanted]))


def _even_in_log_snr(betas: np.ndarray, section_counts: str) -> list[int]:
    """N timesteps from the last one to 0, evenly spaced in log(alpha / sigma) (DPM-Solver, arXiv 2206.00927, sec. 3.3).

    DPM-Solver++ extrapolates in this quantity; even steps of it keep the weights at 1/2. Even steps of t end in steps
    of it that are many times those before, and the weights overshoot. The authors' program recommends them for large
    images, though, with a lower order at the end.
    """
    wanted = _count(section_counts, "logsnr")
    if not 1 <= wanted <= len(betas):
        raise UsageError(f"section_counts: logsnr keeps 1 to {len(betas)} steps, not {str(wanted)[:20]}")
    available = half_log_snr(np.cumprod(1.0 - betas))
    last = min(round(LOGSNR_START * len(betas)), len(betas) - 1)
    targets = np.linspace(available[last], available[0], wanted)
    timesteps = np.arange(len(betas))
    nearest = np.round(np.interp(-targets[::-1], -available, timesteps)).astype(int)
    # At low noise, the timesteps lie farther apart than many targets: each takes the next free one.
    places = timesteps[:wanted]
    kept = np.maximum.accumulate(nearest - places) + places
    return np.minimum(kept, len(betas) - wanted + places).tolist()


def _count(section_counts: str, prefix: str) -> int:
    try:
        return int(section_counts.removeprefix(prefix))
    except ValueError:
        raise UsageError(f"section_counts: {section_counts[:40]!r} is not {prefix} followed by a number") from None


def respaced_betas(betas: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """Betas of the process that keeps only some timesteps and has the original cumulative products there."""
    alphas_cumprod = np.cumprod(1.0 - betas)[list(kept)]
    previous = np.concatenate([[1.0], alphas_cumprod[:-1]])
    return 1.0 - alphas_cumprod / previous


def half_log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """lambda = log(alpha / sigma) of DPM-Solver, half the log of the signal-to-noise ratio, (N,) float64."""
    return 0.5 * np.log(alphas_cumprod / (1.0 - alphas_cumprod))


def extrapolation_weights(alphas_cumprod: np.ndarray) -> np.ndarray:
    """The weights w of DPM-Solver++(2M), which replaces x_0 by x_0 + w (x_0 - x_0 of the step before).

    w = h / (2 h') for a step h of lambda, where h' is the step before (Lu et al. 2022, arXiv 2211.01095, algorithm 2).
    The first and the last two steps have first order, w = 0: nothing lies before the first one; the way to x_0 is
    infinite; and with few steps, as the authors' program does below 15, that to t = 0 is better not extrapolated.

    Args:
        alphas_cumprod: (N,) of a process.

    Returns:
        (N,) float64 >= 0, at the timestep that a step leaves.
    """
    steps = -np.diff(half_log_snr(alphas_cumprod))
    weights = np.zeros_like(alphas_cumprod)
    weights[2:-1] = steps[1:-1] / (2 * steps[2:])
    return weights
