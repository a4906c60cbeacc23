"""Sheets that show people what a trained diffusion model does: its steps, and its reconstructions of given images."""

from collections.abc import Sequence

import numpy as np
import torch

from models.sdas.pictures import from_pictures, to_pictures
from models.sdas.reconstruction import reconstruct
from models.sdas.sampler import Sampler
from utils.device import to_device
from utils.pictures import contact_sheet, thumbnail

STEP_IMAGES = 3
MOST_STEPS = 20  # columns of a sheet; of more steps, some are shown
MOST_SIDE = 160  # of a picture in a sheet of steps, in pixels
DIFFERENCE_FACTOR = 4


def step_sheet(sampler: Sampler, name: str, number: int, strength: Sequence[float]) -> np.ndarray:
    """What every step of sampling leaves of the first images of a class, and the x_0 that it predicts.

    Args:
        number: the class's number.
        strength: range [low, high] of s.

    Returns:
        (H,W,3) uint8: two rows per image, one column per step.
    """
    count = sampler.process.num_timesteps
    shown = {int(t) for t in np.linspace(count - 1, 0, min(count, MOST_STEPS)).round()}
    states = {}  # by timestep; with start_depth, the first ones are left out

    def keep(t: int, x: torch.Tensor, pred_xstart: torch.Tensor) -> torch.Tensor:
        if t in shown:
            states[t] = to_pictures(x), to_pictures(pred_xstart)
        return x

    sampler.draw(name, number, range(STEP_IMAGES), *strength, progress=True, after_step=keep)
    rows = []
    for i in range(STEP_IMAGES):
        rows.append((f"image {i}, after the step from t", [thumbnail(x[i], MOST_SIDE) for x, _ in states.values()]))
        rows.append(("predicted x_0", [thumbnail(x_0[i], MOST_SIDE) for _, x_0 in states.values()]))
    return contact_sheet(rows, [f"t={sampler.process.timestep_map[t]}" for t in states])


def reconstructions(sampler: Sampler, number: int, images: np.ndarray) -> np.ndarray:
    """Images (N,H,W,3) uint8 of a class, inverted to noise and sampled back."""
    scaled = to_device(from_pictures(images), sampler.device)
    return to_pictures(reconstruct(sampler.process, sampler.model, scaled, number))


def reconstruction_sheet(names: Sequence[str], images: np.ndarray, recon: np.ndarray) -> np.ndarray:
    """A row per image: it, its reconstruction, and their difference times DIFFERENCE_FACTOR.

    Args:
        names: captions of the rows.
        images, recon: (N,H,W,3) uint8.
    """
    differences = np.abs(images.astype(np.int16) - recon).max(axis=3) * DIFFERENCE_FACTOR
    cells = zip(images, recon, differences.clip(0, 255).astype(np.uint8), strict=True)
    return contact_sheet(
        list(zip(names, cells, strict=True)), ["image", "reconstruction", f"{DIFFERENCE_FACTOR} x difference"]
    )
