"""Sheets of what a diffusion model does."""

import numpy as np
import torch

from models.sdas import SpacedDiffusion
from models.sdas.sampler import Beginning, Sampler
from models.sdas.sheets import MOST_STEPS, reconstruction_sheet, reconstructions, step_sheet
from tests.models.test_diffusion import Gaussian

CAPTION, GAP = 18, 4


def sampler_of(steps: int) -> Sampler:
    exact = Gaussian(0.2, 0.1)
    process = SpacedDiffusion(1000, f"ddim{steps}", "linear")
    return Sampler(process, lambda x, t, y: exact(x, t), None, "ancestral", "off", (64, 64), 1, torch.device("cpu"))


def test_the_steps_end_with_the_images_that_are_drawn():
    sampler = sampler_of(5)
    sheet = step_sheet(sampler, "dots", 0, [0.1, 0.2])
    drawn = sampler.draw("dots", 0, range(3), 0.1, 0.2)
    assert sheet.shape[1] == 5 * 64 + 4 * GAP
    row = CAPTION + 64 + GAP
    for i in range(3):
        top = 2 * CAPTION + 2 * i * row
        cells = sheet[top : top + 64]
        np.testing.assert_array_equal(cells[:, -64:], drawn[i])
        predicted = sheet[top + row : top + row + 64]
        np.testing.assert_array_equal(predicted[:, -64:], drawn[i])  # the last step takes x_0 as it is predicted
        # Less and less noise is left.
        away = [np.abs(cells[:, left : left + 64] - drawn[i].astype(float)).mean() for left in range(0, 340, 68)]
        assert (np.diff(away) < 0).all(), away
        assert np.abs(predicted[:, :64] - drawn[i].astype(float)).mean() < away[0]


def test_steps_before_the_images_begin_are_left_out():
    sampler = sampler_of(20)
    sampler.beginning = Beginning(lambda name, share: torch.zeros(3, 64, 64), (0.2, 0.4))
    sheet = step_sheet(sampler, "dots", 0, [0.1, 0.2])
    steps = (sheet.shape[1] + GAP) // (64 + GAP)
    assert sheet.shape[1] == steps * (64 + GAP) - GAP
    assert 4 <= steps <= 9
    np.testing.assert_array_equal(sheet[2 * CAPTION :][:64, -64:], sampler.draw("dots", 0, [0], 0.1, 0.2)[0])


def test_an_image_is_given_to_after_step_as_it_is_until_it_begins():
    noise, given = torch.randn(2, 3, 8, 8), {}

    def keep(t: int, x: torch.Tensor, pred_xstart: torch.Tensor) -> torch.Tensor:
        given[t] = x[1], pred_xstart[1]
        return x

    sampler_of(4).process.p_sample_loop(Gaussian(0.2, 0.1), noise, start=[3, 1], after_step=keep)
    assert all(torch.equal(values, noise[1]) for t in (3, 2) for values in given[t])
    assert not torch.equal(given[1][0], noise[1])


def test_of_many_steps_some_are_shown():
    sheet = step_sheet(sampler_of(50), "dots", 0, [0.1, 0.2])
    assert sheet.shape[1] == MOST_STEPS * (64 + GAP) - GAP


def test_reconstructions_are_close_for_a_model_that_knows_the_data():
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(153, 13, (2, 64, 64, 3)), 0, 255).astype(np.uint8)
    recon = reconstructions(sampler_of(250), 0, images)
    assert np.abs(recon.astype(int) - images).mean() < 3
    assert not np.array_equal(recon[0], recon[1])
    sheet = reconstruction_sheet(["a.png", "b.png"], images, recon)
    top = 2 * CAPTION + 128 + GAP + CAPTION
    row = sheet[top : top + 128 : 2]  # enlarged twofold
    np.testing.assert_array_equal(row[:, :128:2], images[1])
    np.testing.assert_array_equal(row[:, 132:260:2], recon[1])
    difference = np.abs(images[1].astype(int) - recon[1]).max(axis=2)
    np.testing.assert_array_equal(row[:, 264::2, 0], (4 * difference).clip(0, 255))
