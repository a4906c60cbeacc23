"""Anomalies on given images, drawn with the exact predictor of Gaussian data."""

import cv2
import numpy as np
import pytest
import torch

from models.sdas import SpacedDiffusion, create_diffusion_unet
from models.sdas.edit import CLOSING, GoodImage, changed_mask, edit_images, edit_inside, put_back, start_of
from models.sdas.sampler import Beginning, Sampler
from tests.models.test_diffusion import FULL, Gaussian
from tests.rule_filled import fill

PROCESSES = {
    "ancestral": SpacedDiffusion(1000, "ddim20", "linear"),
    "ddim": SpacedDiffusion(1000, "ddim20", "linear"),
    "dpmpp_2m_sde": SpacedDiffusion(1000, "logsnr20", "linear"),
}
SAMPLERS = pytest.mark.parametrize("sampler", list(PROCESSES))
SIDE = 16
MEAN, STD = 0.1, 0.2


def goods(count: int, side: int = SIDE) -> torch.Tensor:
    """Images (N,3,side,side) of the distribution that the predictor knows."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(9))
    return (MEAN + STD * noise).clamp(-1, 1)


def inside(count: int) -> torch.Tensor:
    masks = torch.zeros(count, 1, SIDE, SIDE, dtype=torch.bool)
    masks[:, :, 3:12, 5:14] = True
    return masks


def edited(sampler: str, images: torch.Tensor, depths, seeds, **options) -> torch.Tensor:
    process = PROCESSES[sampler]
    start = [start_of(process, depth) for depth in depths]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    model = options.pop("model", Gaussian(MEAN, STD))
    return edit_inside(process, sampler, model, images, inside(len(images)), start, generators, **options)


def mean_change(sampler: str, depth: float, s: float) -> float:
    images = goods(8)
    return float(
        (edited(sampler, images, [depth] * 8, range(8), s=s) - images).abs()[inside(8).expand_as(images)].mean()
    )


@SAMPLERS
def test_pixels_change_inside_the_mask_only(sampler):
    images = goods(4)
    drawn = edited(sampler, images, [0.2, 0.3, 0.45, 0.6], range(4), s=0.1)
    outside = ~inside(4).expand_as(images)
    assert torch.equal(drawn[outside], images[outside])
    assert (drawn != images)[~outside].float().mean() > 0.99


@SAMPLERS
def test_a_greater_depth_changes_more(sampler):
    changes = [mean_change(sampler, depth, 0.05) for depth in (0.05, 0.15, 0.3, 0.45, 0.6)]
    assert (np.diff(changes) > 0).all(), changes


@SAMPLERS
def test_a_greater_strength_changes_more(sampler):
    changes = [mean_change(sampler, 0.4, s) for s in (0.0, 0.1, 0.2, 0.4, 0.8)]
    assert (np.diff(changes) > 0).all(), changes


def test_from_the_greatest_depth_and_without_strength_the_inside_is_drawn_from_the_data():
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    drawn = edit_inside(FULL, "ancestral", Gaussian(MEAN, STD), goods(8), inside(8), [999] * 8, generators)
    drawn = drawn[inside(8).expand_as(drawn)]
    assert drawn.mean() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std() == pytest.approx(STD, rel=0.1)


@SAMPLERS
def test_an_edit_does_not_depend_on_its_batch(sampler):
    model = fill(create_diffusion_unet(32, 1, [1, 2], [2], 2, num_head_channels=32))
    images, depths = goods(3), [0.6, 0.2, 0.4]

    def draw(chosen):
        kwargs = {"y": torch.zeros(len(chosen), dtype=torch.long)}
        return edited(sampler, images[chosen], [depths[i] for i in chosen], chosen, model=model, model_kwargs=kwargs)

    together = draw([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], draw([i]), rtol=1e-4, atol=1e-4)


@SAMPLERS
def test_the_network_sees_the_original_around_the_mask_at_the_noise_of_every_step(sampler):
    """The mean over many images of what it sees, divided by alpha, is the original's."""
    images, seen = torch.full((64, 3, SIDE, SIDE), 0.7), []
    exact = Gaussian(MEAN, STD)

    def model(x, t):
        seen.append((int(t[0]), x))
        return exact(x, t)

    edited(sampler, images, [0.4] * 64, range(64), model=model)
    outside = ~inside(64).expand_as(images)
    assert [t for t, _ in seen] == PROCESSES[sampler].timestep_map[: len(seen)][::-1]
    for t, x in seen:
        noise = (x - FULL.sqrt_alphas_cumprod[t] * 0.7) / FULL.sqrt_one_minus_alphas_cumprod[t]
        assert noise[outside].mean() == pytest.approx(0, abs=0.03)
        assert noise[outside].std() == pytest.approx(1, abs=0.03)


def test_depth_means_the_same_noise_for_any_steps():
    for process in PROCESSES.values():
        starts = [start_of(process, depth) for depth in (0, 0.3, 0.6, 1)]
        assert starts == sorted(set(starts))
        assert starts[0] == 0
        assert starts[-1] == process.num_timesteps - 1
        assert abs(process.timestep_map[starts[2]] - 600) < 60


# ---- at an image's own size ------------------------------------------------------------------------------------------


def test_at_the_models_size_the_edit_is_taken_as_it_is():
    rng = np.random.default_rng(0)
    image, after = rng.integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
    mask = (rng.random((12, 12)) < 0.5).astype(np.uint8)
    expected = np.where(mask[..., None] > 0, after, image)
    np.testing.assert_array_equal(put_back(image, mask, image, after), expected)


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (10, 12)])
def test_a_change_at_another_size_keeps_the_grain_and_the_outside(size):
    rng = np.random.default_rng(0)
    image = rng.integers(100, 140, (*size, 3)).astype(np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[2 : size[0] - 2, 2 : size[1] - 2] = 1
    before = np.full((16, 16, 3), 120, np.uint8)
    result = put_back(image, mask, before, before + 50)
    difference = result.astype(int) - image
    assert not difference[mask == 0].any()
    assert difference.max() == 50
    middle = difference[size[0] // 2 - 1 : size[0] // 2 + 1, size[1] // 2 - 1 : size[1] // 2 + 1]
    np.testing.assert_array_equal(middle, 50)  # the grain is that of the image
    assert (difference[mask > 0] > 0).all()


@pytest.mark.parametrize("size", [(200, 9), (9, 200)])
def test_a_thin_mask_is_drawn_whole_in_an_image_that_is_longer_than_the_model_and_narrower(size):
    image, mask = np.full((*size, 3), 80, np.uint8), np.zeros(size, np.uint8)
    across = mask if size[0] > size[1] else mask.T
    across[7::25] = 1  # lines of one pixel across the long side
    seen = []

    def model(x, t, y):
        seen.append(x)
        return Gaussian(0.4, 0.1)(x, t)

    good = GoodImage(image, cv2.resize(image, (SIDE, SIDE)), mask, 1)
    edit_images(sampler_of(model), 0, [good], [0.3, 0.3], [0.8, 0.8])
    last = seen[-1][0].mean(dim=0).numpy()  # nearly without noise: where it is drawn, it is brighter
    rows = last.mean(axis=1 if size[0] > size[1] else 0)
    held = {(7 + 25 * k) * SIDE // 200 for k in range(8)}
    drawn = {int(i) for i in np.flatnonzero(rows > -0.1)}
    assert held <= drawn
    assert len(drawn) < SIDE


def test_the_mask_is_what_shows():
    image = np.full((64, 64, 3), 100, np.uint8)
    drawn = np.zeros((64, 64), np.uint8)
    drawn[8:56, 8:56] = 1
    edited = image.copy()
    edited[20:30, 20:30] += 40
    edited[25, 25] = 100  # a gap
    edited[40:50, 40:50] += 3  # does not show
    found = changed_mask(image, edited, drawn)
    assert found[20:30, 20:30].all()
    assert found.sum() <= (10 + CLOSING) ** 2
    assert not changed_mask(image, image, drawn).any()
    assert not changed_mask(image, edited, np.zeros_like(drawn)).any()
    grain = np.random.default_rng(0).normal(0, 6, image.shape)
    assert not changed_mask(image, np.clip(image + grain, 0, 255).astype(np.uint8), drawn).any()


def sampler_of(model, size=(SIDE, SIDE)) -> Sampler:
    process = PROCESSES["ancestral"]
    return Sampler(process, model, None, "ancestral", "off", size, 1, torch.device("cpu"))


def test_edits_of_larger_images_change_where_their_masks_say_and_depend_on_their_seeds_only():
    rng = np.random.default_rng(0)
    exact = Gaussian(0.4, 0.1)
    sampler = sampler_of(lambda x, t, y: exact(x, t))
    given = []
    for i, size in enumerate(((32, 32), (48, 40), (16, 16))):
        mask = np.zeros(size, np.uint8)
        mask[4:-4, 4:-4] = 1
        image = rng.integers(60, 100, (*size, 3)).astype(np.uint8)
        given.append(GoodImage(image, np.full((SIDE, SIDE, 3), 80, np.uint8), mask, 100 + i))
    edits = edit_images(sampler, 0, given, [0.1, 0.3], [0.3, 0.6])
    for good, edit in zip(given, edits, strict=True):
        assert edit.mask.any()
        assert not edit.mask[good.mask == 0].any()
        np.testing.assert_array_equal(edit.image[edit.mask == 0], good.image[edit.mask == 0])
        assert (edit.image != good.image).any(axis=2)[edit.mask > 0].mean() > 0.9
        assert 0.1 <= edit.strength <= 0.3
        assert 0.3 <= edit.depth <= 0.6
    alone = edit_images(sampler, 0, given[1:2], [0.1, 0.3], [0.3, 0.6])[0]
    np.testing.assert_array_equal(alone.image, edits[1].image)
    assert (alone.strength, alone.depth) == (edits[1].strength, edits[1].depth)
    assert len({edit.depth for edit in edits}) == 3


def test_a_grey_image_stays_grey_if_that_is_asked_for():
    sampler = sampler_of(lambda x, t, y: Gaussian(0.4, 0.1)(x, t))
    image, mask = np.full((24, 24, 3), 80, np.uint8), np.ones((24, 24), np.uint8)
    colour, grey = (
        edit_images(sampler, 0, [GoodImage(image, image[:SIDE, :SIDE], mask, 1, flag)], [0.3, 0.3], [0.6, 0.6])[0]
        for flag in (False, True)
    )
    assert np.ptp(colour.image, axis=2).max() > 10
    assert not np.ptp(grey.image, axis=2).any()
    assert grey.mask.any()


def test_images_that_begin_with_good_ones_keep_them_the_more_the_less_deep():
    class Sees(Gaussian):
        def __call__(self, x, t, y):
            return super().__call__(x, t)

    images = {"a": goods(4), "b": goods(4) - 0.3}

    def drawn(depth: tuple[float, float], indices: list[int], name: str = "a") -> np.ndarray:
        beginning = Beginning(lambda name, share: images[name][int(share * 4)], depth)
        device = torch.device("cpu")
        process = PROCESSES["dpmpp_2m_sde"]
        sampler = Sampler(process, Sees(MEAN, STD), None, "dpmpp_2m_sde", "off", (SIDE, SIDE), 1, device, beginning)
        return sampler.draw(name, 0, indices, 0.0, 0.0)

    def nearest(pictures: np.ndarray, name: str) -> float:
        own = ((images[name].permute(0, 2, 3, 1).numpy() + 1) * 127.5)[None]
        return float(np.abs(pictures[:, None] - own).mean(axis=(2, 3, 4)).min(axis=1).mean())

    together = {depth: drawn((depth, depth), list(range(8))) for depth in (0.0, 0.3, 0.6, 0.95)}
    distances = [nearest(pictures, "a") for pictures in together.values()]
    assert distances == sorted(distances)
    assert distances[0] < 3 < 15 < distances[-1]
    assert nearest(drawn((0.0, 0.0), [0, 1], "b"), "b") < 3
    # An image depends on its own numbers only; a range gives each its own depth.
    mixed = drawn((0.0, 0.95), list(range(8)))
    assert np.array_equal(drawn((0.0, 0.95), [5, 2]), mixed[[5, 2]])
    spread = [nearest(mixed[[i]], "a") for i in range(8)]
    assert min(spread) + 10 < max(spread)
