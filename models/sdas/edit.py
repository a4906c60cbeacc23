"""Anomalies on a given good image: it is noised to a depth and drawn back with strength s, inside a mask only.

Sources: Meng et al. 2022 (SDEdit, arXiv 2108.01073: the reverse process begins at a middle step, with the noised
image), Lugmayr et al. 2022 (RePaint, arXiv 2201.09865, eq. 8: outside the mask, every step gets the noised original),
Zhang et al. 2024 (RealNet, eq. 4: the variance scaled by 1 + s).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from models.sdas.diffusion import SpacedDiffusion, Strength, start_of
from models.sdas.noise import draw_noise
from models.sdas.pictures import from_pictures, to_pictures
from models.sdas.sampler import Sampler
from utils.device import to_device
from utils.errors import RunError

VISIBLE = 8.0  # grey levels by which the mean of a square differs where an image counts as changed
SQUARE = 5  # side of that square, in pixels
CLOSING = 5  # side of the ellipse that closes gaps of the mask, in pixels
LEAST_SHARE = 5e-4  # of an image's pixels, below which a connected change is too small to be an anomaly


def edit_inside(
    process: SpacedDiffusion,
    sampler: str,
    model: Callable,
    images: torch.Tensor,
    masks: torch.Tensor,
    start: Sequence[int],
    generators: Sequence[torch.Generator],
    s: Strength = 0.0,
    cond_fn: Callable | None = None,
    model_kwargs: dict | None = None,
) -> torch.Tensor:
    """Draw the inside of masks again, from a middle timestep on.

    Args:
        sampler: see SpacedDiffusion.sample_loop.
        model, s, cond_fn, model_kwargs: see SpacedDiffusion.p_sample.
        images: (N,3,H,W) in [-1, 1].
        masks: (N,1,H,W) bool.
        start: timestep of the process that each image is noised to, see start_of.
        generators: one per image, so that an image depends on its own generator only.

    Returns:
        (N,3,H,W), equal to `images` outside the masks.
    """

    def noised(t: Sequence[int], needed: Sequence[bool] | None = None) -> torch.Tensor:
        noise = draw_noise(images, generators, needed)
        return process.q_sample(images, to_device(torch.tensor(t), images.device), noise)

    def keep_outside(t: int, x: torch.Tensor, pred_xstart: torch.Tensor) -> torch.Tensor:
        del pred_xstart
        if t == 0:
            return torch.where(masks, x, images)
        return torch.where(masks, x, noised([t - 1] * len(x), [t <= begin for begin in start]))

    loop = process.sample_loop(sampler)
    kwargs = {"s": s, "cond_fn": cond_fn, "model_kwargs": model_kwargs, "generator": generators}
    return loop(model, noised(start), start=start, after_step=keep_outside, **kwargs)


def put_back(image: np.ndarray, mask: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Add what an edit at the model's size has changed to an image at its own size, whose grain stays.

    From the border of the mask inwards, the change fades in over half a pixel of the model; if the sizes are equal, it
    is there at once.

    Args:
        image: (H,W,3) uint8.
        mask: (H,W) uint8 in {0, 1}; outside, the image stays as it is.
        before, after: (h,w,3) uint8, the image at the model's size and its edit.

    Returns:
        (H,W,3) uint8.
    """
    height, width = mask.shape
    change = after.astype(np.float32) - before
    if change.shape[:2] != mask.shape:
        change = _resized(change, (height, width), cv2.INTER_LINEAR)
    fade = max(1.0, height / before.shape[0] / 2, width / before.shape[1] / 2)
    distance = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    weight = np.minimum(distance / fade, 1)[..., None]
    return np.clip(np.round(image + weight * change), 0, 255).astype(np.uint8)


def _resized(values: np.ndarray, size: Sequence[int], growing: int) -> np.ndarray:
    """An array at another size (height, width): averaged along sides that shrink.

    Args:
        growing: OpenCV's interpolation along sides that grow.
    """

    def along(values: np.ndarray, height: int, width: int, shrinks: bool) -> np.ndarray:
        return cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA if shrinks else growing)

    lower, narrower = (new < old for new, old in zip(size, values.shape[:2], strict=True))
    if lower == narrower:
        return along(values, *size, lower)
    # OpenCV averages along no side if the other one grows.
    return along(along(values, size[0], values.shape[1], lower), *size, narrower)


def changed_mask(image: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Where an edit shows: the mean of a square of pixels differs by VISIBLE in a channel; small gaps are closed.

    Means are compared, as the grain of an image is drawn anew even where nothing else has changed.

    Args:
        image, edited: (H,W,3) uint8.
        mask: (H,W) uint8 in {0, 1}, to which the result is limited.

    Returns:
        (H,W) uint8 in {0, 1}, without parts that are less than LEAST_SHARE of the image.
    """
    difference = cv2.blur(edited.astype(np.float32) - image, (SQUARE, SQUARE))
    shows = (np.abs(difference).max(axis=2) >= VISIBLE).astype(np.uint8)
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (CLOSING, CLOSING))
    shows = cv2.morphologyEx(shows, cv2.MORPH_CLOSE, ellipse) * mask
    _, parts, stats, _ = cv2.connectedComponentsWithStats(shows, connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= LEAST_SHARE * mask.size
    large[0] = False  # what has not changed
    return large[parts].astype(np.uint8)


@dataclass(frozen=True)
class GoodImage:
    """A good image to put an anomaly on.

    Args:
        image: (H,W,3) uint8.
        reduced: (h,w,3) uint8, the same at the model's size.
        mask: (H,W) uint8 in {0, 1}, where it may change.
        seed: of its random numbers, see sampler.image_seed.
        grey: whether the three channels have to stay equal.
    """

    image: np.ndarray
    reduced: np.ndarray
    mask: np.ndarray
    seed: int
    grey: bool = False


@dataclass(frozen=True)
class Edit:
    """A good image with an anomaly.

    Args:
        image: (H,W,3) uint8, outside the mask equal to the good image.
        mask: (H,W) uint8 in {0, 1}, where it has changed; all zeros if nothing shows.
        strength: s. depth: the share of T that the image was noised to.
    """

    image: np.ndarray
    mask: np.ndarray
    strength: float
    depth: float


def edit_images(
    sampler: Sampler, number: int, goods: Sequence[GoodImage], strength: Sequence[float], depth: Sequence[float]
) -> list[Edit]:
    """Put an anomaly on each good image of a class.

    Args:
        number: the class's number.
        strength, depth: ranges [low, high], of which each image gets its own.

    Raises:
        RunError: the model draws values that are not finite.
    """
    generators = [torch.Generator().manual_seed(good.seed) for good in goods]
    drawn = torch.stack([torch.rand(2, generator=generator) for generator in generators])
    strengths = strength[0] + (strength[1] - strength[0]) * drawn[:, 0]
    depths = depth[0] + (depth[1] - depth[0]) * drawn[:, 1]
    reduced = np.stack([good.reduced for good in goods])
    # Every pixel of the model that reaches into the mask is drawn; put_back cuts what lies outside.
    masks = [_resized(good.mask * 255.0, sampler.size, cv2.INTER_AREA) > 0 for good in goods]
    edited = edit_inside(
        sampler.process,
        sampler.method,
        sampler.model,
        to_device(from_pictures(reduced), sampler.device),
        to_device(torch.from_numpy(np.stack(masks)[:, None]), sampler.device),
        [start_of(sampler.process, float(d)) for d in depths],
        generators,
        to_device(strengths, sampler.device),
        sampler.cond_fn,
        {"y": torch.full((len(goods),), number, device=sampler.device)},
    )
    if not edited.isfinite().all():
        raise RunError("the model draws values that are not finite; it has diverged, or needs amp: off")
    pictures = to_pictures(edited)
    return [
        _finish(good, after, float(s), float(d))
        for good, after, s, d in zip(goods, pictures, strengths, depths, strict=True)
    ]


def _finish(good: GoodImage, after: np.ndarray, strength: float, depth: float) -> Edit:
    """The edit of a good image at its own size; what does not show is left as it was."""
    if good.grey:
        # The mean change of the channels: an image that the model leaves as it is stays so.
        change = (after.astype(np.float32) - good.reduced).mean(axis=2, keepdims=True)
        after = np.clip(np.round(good.reduced + change), 0, 255).astype(np.uint8)
    edited = put_back(good.image, good.mask, good.reduced, after)
    mask = changed_mask(good.image, edited, good.mask)
    return Edit(np.where(mask[..., None] > 0, edited, good.image), mask, strength, depth)
