"""DPM-Solver++(2M) on data whose noise predictor, probability-flow ODE and classifier are known in closed form."""

from functools import partial

import pytest
import torch

from models.sdas import SpacedDiffusion, create_diffusion_unet
from models.sdas.noise import draw_noise
from tests.rule_filled import fill

T = 1000
FULL = SpacedDiffusion(T, "ddim1000", "linear")
KINDS = pytest.mark.parametrize("stochastic", [False, True], ids=["ode", "sde"])


class Mixture:
    """The exact predictor for pixels that are N(mean, std^2) with one of the means, each equally likely.

    It also returns a learned variance, which the solver must not look at.
    """

    def __init__(self, means, std):
        self.means, self.std = means, std
        self.seen = []  # (original t, x) of each call

    def parts(self, x, t):
        """alpha, the variance of x_t for one mean, and the log of each mean's posterior probability."""
        alpha = torch.tensor(FULL.alphas_cumprod)[t].sqrt().float()[:, None, None, None]
        variance = alpha**2 * self.std**2 + 1 - alpha**2
        logits = torch.stack([-((x - alpha * mean) ** 2) / (2 * variance) for mean in self.means])
        return alpha, variance, logits.log_softmax(dim=0)

    def __call__(self, x, t):
        self.seen.append((int(t[0]), x))
        alpha, variance, log_probs = self.parts(x, t)
        mean = sum(p * m for p, m in zip(log_probs.exp(), self.means, strict=True))
        eps = (1 - alpha**2).sqrt() * (x - alpha * mean) / variance
        return torch.cat([eps, torch.full_like(x, torch.nan)], dim=1)

    def gradient(self, x, t, chosen):
        """grad_x log p(mean | x_t) of each pixel, for the mean with the number `chosen`."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.parts(x, t)[2][chosen].sum(), x)[0]


def spaced(count, scheduler="linear"):
    return SpacedDiffusion(T, f"logsnr{count}", scheduler)


def start(*shape):
    generator = torch.Generator().manual_seed(0)
    return generator, torch.randn(shape, generator=generator)


def ode_error(steps):
    """RMS difference from the exact solution at t = 61, where the noise has twice the deviation of the data."""
    model = Mixture([0.2], 0.1)
    spaced(steps).dpm_solver_sample_loop(model, start(2, 3, 8, 8)[1], stochastic=False)
    scales = {t: model.parts(x, torch.tensor([t]))[:2] for t, x in model.seen}
    first, (alpha, variance) = model.seen[0], scales[model.seen[0][0]]
    standard = (first[1] - alpha * 0.2) / variance.sqrt()  # the ODE keeps it
    t, x = min(model.seen, key=lambda seen: abs(seen[0] - 61))
    return (x - scales[t][0] * 0.2 - scales[t][1].sqrt() * standard).square().mean().sqrt()


def test_the_ode_solver_has_second_order():
    errors = [ode_error(steps) for steps in (19, 37, 73)]  # all pass t = 61
    assert 3.2 < errors[0] / errors[1] < 5.2
    assert 3.2 < errors[1] / errors[2] < 5.2


@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_first_and_the_last_step_are_those_of_ddim(count):
    process, (_, noise) = spaced(count), start(1, 3, 4, 4)
    model = Mixture([0.2], 0.1)
    drawn = process.dpm_solver_sample_loop(model, noise, stochastic=False)
    states = [x for _, x in model.seen] + [drawn]
    for i in (0, count - 1):
        step = process.ddim_sample(Mixture([0.2], 0.1), states[i], torch.tensor([count - 1 - i]))["pred_xstart"]
        expected = drawn if i == count - 1 else states[1]
        if i == count - 1:
            torch.testing.assert_close(step, expected)
        else:
            alpha, sigma = process.sqrt_alphas_cumprod[-2], process.sqrt_one_minus_alphas_cumprod[-2]
            eps = model(states[0], torch.tensor([process.timestep_map[-1]]))[:, :3]
            torch.testing.assert_close(expected, alpha * step + sigma * eps, rtol=1e-4, atol=1e-4)
    assert len(model.seen) == count + (count > 1)


@KINDS
@pytest.mark.parametrize(("count", "tolerance"), [(10, 0.2), (20, 0.02)])
def test_samples_have_the_mean_and_deviation_of_the_data(stochastic, count, tolerance):
    generator, noise = start(4, 3, 32, 32)
    loop = partial(spaced(count).dpm_solver_sample_loop, stochastic=stochastic)
    samples = loop(Mixture([0.3], 0.1), noise, generator=generator)
    assert samples.mean() == pytest.approx(0.3, abs=0.005)
    assert samples.std() == pytest.approx(0.1, rel=tolerance)


def test_strength_widens_the_samples_of_its_image_only():
    generator, noise = start(1, 3, 32, 32)
    strengths = torch.tensor([0.0, 0.2, 0.5, 2.0])
    same = [torch.Generator().manual_seed(1) for _ in strengths]
    samples = spaced(10).dpm_solver_sample_loop(
        Mixture([0.0], 0.2), noise.expand(4, -1, -1, -1), s=strengths, generator=same
    )
    assert (samples.std(dim=(1, 2, 3)).diff() > 0).all()
    plain = spaced(10).dpm_solver_sample_loop(Mixture([0.0], 0.2), noise, generator=generator.manual_seed(1))
    torch.testing.assert_close(samples[:1], plain)


@KINDS
def test_guidance_shifts_the_class(stochastic):
    generator, noise = start(1, 3, 32, 32)
    model = Mixture([-0.4, 0.4], 0.1)
    loop = partial(spaced(10).dpm_solver_sample_loop, model, noise, stochastic=stochastic, generator=generator)
    assert abs((loop() > 0).float().mean() - 0.5) < 0.05
    for chosen, mean in enumerate(model.means):
        samples = loop(cond_fn=partial(model.gradient, chosen=chosen))
        # The exact classifier makes the exact predictor of one class.
        assert samples.mean() == pytest.approx(mean, abs=0.01)


@KINDS
def test_an_image_does_not_depend_on_its_batch(stochastic):
    model = fill(create_diffusion_unet(32, 1, [1, 2], [2], 2, num_head_channels=32))

    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = draw_noise(torch.empty(len(seeds), 3, 16, 16), generators)
        kwargs = {"y": torch.zeros(len(seeds), dtype=torch.long)}
        return spaced(5, "cosine").dpm_solver_sample_loop(
            model, noise, stochastic, s=0.1, model_kwargs=kwargs, generator=generators
        )

    torch.testing.assert_close(draw([5, 6, 7])[2:], draw([7]), rtol=1e-4, atol=1e-4)


@KINDS
def test_predictions_are_clipped(stochastic):
    """A predictor whose x_0 lies far outside [-1, 1] draws images in it, guided or not."""
    noise = start(1, 3, 4, 4)[1]
    loop = partial(spaced(8).dpm_solver_sample_loop, Mixture([5.0], 0.1), noise, stochastic)
    for cond_fn in (None, lambda x, t: torch.full_like(x, 1e4)):
        torch.testing.assert_close(loop(cond_fn=cond_fn), torch.ones_like(noise))
