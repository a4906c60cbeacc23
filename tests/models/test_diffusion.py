import math

import numpy as np
import pytest
import torch
from torch import nn

from models.sdas import SpacedDiffusion, create_classifier_unet, create_diffusion_unet
from models.sdas.blocks import AttentionBlock, GroupNorm32, attend
from models.sdas.guidance import classifier_guidance
from models.sdas.noise import draw_noise
from models.sdas.sampler import Sampler
from tests.conftest import CLASSIFIER, UNET
from tests.rule_filled import fill, randn
from utils.errors import UsageError
from utils.precision import cast_weights

PROCESS = SpacedDiffusion(1000, "ddim20", "linear")
FULL = SpacedDiffusion(1000, "ddim1000", "linear")


class Gaussian:
    """The exact noise predictor for data from N(mean, std^2), with a constant v for the variance."""

    def __init__(self, mean: float, std: float, v: float = 0.0) -> None:
        self.mean, self.std, self.v = mean, std, v
        self.seen = []

    def __call__(self, x, t, **kwargs):
        self.seen.append(t.clone())
        alpha_bar = torch.tensor(FULL.alphas_cumprod)[t].float()[:, None, None, None]
        # E[eps | x_t] for jointly Gaussian x_0 and eps.
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        eps = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * self.mean) / variance
        return torch.cat([eps, torch.full_like(x, self.v)], dim=1)


def test_model_sees_the_original_timesteps():
    model = Gaussian(0.0, 0.5)
    PROCESS.p_sample(model, randn(0, 2, 3, 4, 4), torch.tensor([0, 19]))
    assert model.seen[0].tolist() == [0, 950]


def test_rescaled_timesteps_reach_1000():
    process = SpacedDiffusion(200, "ddim200", "linear", rescale_timesteps=True)
    assert process.model_timesteps(torch.tensor([0, 100])).tolist() == [0, 500]


def test_q_sample_has_the_closed_form():
    x, noise = randn(0, 2, 3, 4, 4), randn(1, 2, 3, 4, 4)
    t = torch.tensor([3, 900])
    alpha_bar = torch.tensor(FULL.alphas_cumprod)[t][:, None, None, None]
    expected = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(FULL.q_sample(x, t, noise), expected.float())


def test_learned_variance_spans_posterior_to_beta():
    x, t = randn(0, 1, 3, 4, 4), torch.tensor([7])
    for v, expected in ((-1.0, PROCESS.posterior_variance[7]), (1.0, PROCESS.betas[7])):
        variance = PROCESS.p_mean_variance(Gaussian(0, 0.5, v), x, t)["variance"]
        torch.testing.assert_close(variance, torch.full_like(variance, expected), rtol=1e-4, atol=0)


def test_three_channels_mean_a_fixed_variance():
    variance = PROCESS.p_mean_variance(lambda x, t: torch.zeros_like(x), randn(0, 1, 3, 4, 4), torch.tensor([7]))
    torch.testing.assert_close(variance["variance"], torch.full((1, 3, 4, 4), PROCESS.betas[7]).float())


@pytest.mark.parametrize("s", [0.0, 0.15, torch.tensor([0.1, 0.4])])
def test_strength_scales_the_variance_by_one_plus_s(s):
    x, noise, t = randn(0, 2, 3, 4, 4), randn(1, 2, 3, 4, 4), torch.tensor([5, 12])
    model = Gaussian(0, 0.5, 0.3)
    learned = PROCESS.p_mean_variance(model, x, t)
    sample = PROCESS.p_sample(model, x, t, s=s, noise=noise)["sample"]
    spread = (sample - learned["mean"]) ** 2 / (learned["variance"] * noise**2)
    expected = 1 + torch.as_tensor(s, dtype=torch.float32).reshape(-1, 1, 1, 1).expand_as(spread)
    torch.testing.assert_close(spread, expected, rtol=1e-2, atol=1e-3)


def test_ddim_adds_sqrt_s_of_the_learned_noise():
    x, noise, t = randn(0, 2, 3, 4, 4), randn(1, 2, 3, 4, 4), torch.tensor([5, 12])
    model = Gaussian(0, 0.5, 0.3)
    plain = PROCESS.ddim_sample(model, x, t, noise=noise)["sample"]
    noisy = PROCESS.ddim_sample(model, x, t, s=0.02, noise=noise)["sample"]
    sigma = PROCESS.p_mean_variance(model, x, t)["variance"].sqrt()
    torch.testing.assert_close(noisy - plain, math.sqrt(0.02) * sigma * noise, rtol=1e-3, atol=1e-5)


def test_no_noise_at_the_last_step():
    x, t = randn(0, 2, 3, 4, 4), torch.tensor([0, 0])
    model = Gaussian(0, 0.5)
    for step in (PROCESS.p_sample, PROCESS.ddim_sample):
        first = step(model, x, t, s=0.2, noise=randn(1, 2, 3, 4, 4))["sample"]
        second = step(model, x, t, s=0.2, noise=randn(2, 2, 3, 4, 4))["sample"]
        assert torch.equal(first, second)


@pytest.mark.parametrize("loop", [FULL.p_sample_loop, FULL.ddim_sample_loop])
def test_samplers_draw_from_the_data_distribution(loop):
    """With the exact predictor of N(0.3, 0.1^2), samples have that mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    samples = loop(Gaussian(0.3, 0.1), torch.randn(4, 3, 16, 16, generator=generator), generator=generator)
    assert samples.mean() == pytest.approx(0.3, abs=0.02)
    assert samples.std() == pytest.approx(0.1, abs=0.01)


def test_strength_widens_the_samples():
    deviations = []
    for s in (0.0, 0.2, 0.5):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 3, 16, 16, generator=generator)
        deviations.append(PROCESS.p_sample_loop(Gaussian(0.0, 0.2), noise, s=s, generator=generator).std())
    assert deviations[0] < deviations[1] < deviations[2]


def test_ddim_inversion_is_undone_by_ddim_sampling():
    x = randn(0, 2, 3, 8, 8) * 0.2
    model = Gaussian(0.0, 0.2)
    noise = FULL.ddim_reverse_sample_loop(model, x)
    assert noise.std() == pytest.approx(1.0, abs=0.1)
    torch.testing.assert_close(FULL.ddim_sample_loop(model, noise), x, rtol=2e-2, atol=5e-3)


def test_guidance_moves_the_mean_by_variance_times_gradient():
    x, t, noise = randn(0, 2, 3, 4, 4), torch.tensor([5, 12]), torch.zeros(2, 3, 4, 4)
    gradient = randn(3, 2, 3, 4, 4)
    seen = []

    def cond_fn(x, t, y):
        seen.append((t.tolist(), y.tolist()))
        return gradient

    kwargs = {"model_kwargs": {"y": torch.tensor([0, 1])}, "noise": noise}
    model = Gaussian(0, 0.5)
    plain = PROCESS.p_sample(model, x, t, **kwargs)["sample"]
    guided = PROCESS.p_sample(model, x, t, cond_fn=cond_fn, **kwargs)["sample"]
    variance = PROCESS.p_mean_variance(model, x, t)["variance"]
    torch.testing.assert_close(guided - plain, variance * gradient, rtol=1e-3, atol=1e-6)
    assert seen == [([250, 600], [0, 1])]


def test_classifier_guidance_is_the_gradient_of_the_log_probability():
    weight = randn(0, 2, 3 * 4 * 4)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False))
    classifier[1].weight.data.copy_(weight)
    x, y = randn(1, 2, 3, 4, 4), torch.tensor([1, 0])
    times = torch.tensor([0, 0])
    got = classifier_guidance(lambda x, t: classifier(x), 2.0)(x, times, y)
    rounded = classifier_guidance(lambda x, t: classifier(x), 2.0, "bf16")(x, times, y)
    assert rounded.dtype == x.dtype
    torch.testing.assert_close(rounded, got, atol=0.02 * float(got.abs().max()), rtol=0)
    assert not torch.equal(rounded, got)
    probabilities = (x.flatten(1) @ weight.T).softmax(dim=1)
    expected = torch.stack([weight[y[i]] - probabilities[i] @ weight for i in range(2)]).reshape_as(x)
    torch.testing.assert_close(got, 2 * expected)


def test_guided_images_in_bf16_are_the_same_with_weights_that_are_cast_once():
    torch.manual_seed(0)
    unet = create_diffusion_unet(**UNET).eval().requires_grad_(False)
    classifier = create_classifier_unet(**CLASSIFIER, image_size=16).eval().requires_grad_(False)
    nn.init.normal_(unet.out[2].weight, std=0.1)
    process, images = SpacedDiffusion(1000, "ddim4", "linear"), []
    for _ in range(2):
        guidance = classifier_guidance(classifier, 1.0, "bf16")
        sampler = Sampler(process, unet, guidance, "ancestral", "bf16", (16, 16), 0, torch.device("cpu"))
        images.append(sampler.draw("dots", 1, range(2), 0.0, 0.2))
        cast_weights(unet, "bf16")
        cast_weights(classifier, "bf16")
    assert np.array_equal(*images)


def test_an_image_does_not_depend_on_its_batch():
    model = fill(create_diffusion_unet(32, 1, [1, 2], [2], 2, num_head_channels=32))

    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = draw_noise(torch.empty(len(seeds), 3, 16, 16), generators)
        y = torch.zeros(len(seeds), dtype=torch.long)
        return PROCESS.p_sample_loop(model, noise, s=0.1, model_kwargs={"y": y}, generator=generators)

    torch.testing.assert_close(draw([5, 6, 7])[2:], draw([7]), rtol=1e-4, atol=1e-4)


def loss_by_hand(x, noise, t, eps, v):
    """Nichol & Dhariwal's loss in float64 numpy, one image at a time."""
    alpha_bar = FULL.alphas_cumprod[t]
    x_t = math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * noise
    mse = ((noise - eps) ** 2).mean()
    x0 = (x_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    c1, c2 = FULL.posterior_mean_coef1[t], FULL.posterior_mean_coef2[t]
    log_low, log_high = FULL.posterior_log_variance_clipped[t], math.log(FULL.betas[t])
    log_var = (v + 1) / 2 * log_high + (1 - v) / 2 * log_low
    mean, true_mean = c1 * x0 + c2 * x_t, c1 * x + c2 * x_t
    if t > 0:
        bits = 0.5 * (log_var - log_low + np.exp(log_low - log_var) - 1 + (true_mean - mean) ** 2 * np.exp(-log_var))
    else:
        cdf = lambda z: 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))  # noqa: E731
        scale = np.exp(0.5 * log_var)
        high, low = cdf((x - mean + 1 / 255) / scale), cdf((x - mean - 1 / 255) / scale)
        p = np.where(x < -0.999, high, np.where(x > 0.999, 1 - low, high - low))
        bits = -np.log(np.maximum(p, 1e-12))
    return mse, bits.mean() / math.log(2)


@pytest.mark.parametrize("t", [0, 1, 400, 999])
def test_training_loss_equals_its_definition(t):
    x = randn(0, 1, 3, 8, 8).clamp(-1, 1)
    noise = randn(1, 1, 3, 8, 8)
    eps, v = noise + 0.1 * randn(2, 1, 3, 8, 8), 0.5 * randn(3, 1, 3, 8, 8)
    losses = FULL.training_losses(lambda x, t: torch.cat([eps, v], 1), x, torch.tensor([t]), noise=noise)
    mse, vb = loss_by_hand(*(a.double().numpy() for a in (x, noise)), t, eps.double().numpy(), v.double().numpy())
    assert losses["mse"].item() == pytest.approx(mse, rel=1e-4)
    assert losses["vb"].item() == pytest.approx(vb, rel=2e-3, abs=1e-6)
    assert losses["loss"].item() == pytest.approx(losses["mse"].item() + losses["vb"].item())


def test_the_bound_trains_the_variance_only():
    eps, v = torch.zeros(1, 3, 4, 4, requires_grad=True), torch.zeros(1, 3, 4, 4, requires_grad=True)
    x = randn(0, 1, 3, 4, 4)
    FULL.training_losses(lambda x, t: torch.cat([eps, v], 1), x, torch.tensor([500]))["vb"].sum().backward()
    assert eps.grad is None or not eps.grad.any()
    assert v.grad.any()


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_classifier_heads_train(pool):
    model = create_classifier_unet(
        32, 1, [1, 2], [2], 5, classifier_pool=pool, num_head_channels=32, image_size=(16, 24)
    )
    logits = model(randn(0, 2, 3, 16, 24), torch.tensor([1, 999]))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_activation_checkpointing_does_not_change_gradients():
    gradients = []
    for use_checkpoint in (False, True):
        model = fill(create_diffusion_unet(32, 1, [1, 2], [2], 2, num_head_channels=32, use_checkpoint=use_checkpoint))
        model(randn(0, 2, 3, 16, 16), torch.tensor([1, 9]), torch.tensor([0, 1])).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_bf16_stays_near_float32():
    model = fill(create_diffusion_unet(32, 1, [1, 2], [2], 2, num_head_channels=32))
    inputs = (randn(0, 2, 3, 16, 16), torch.tensor([1, 9]), torch.tensor([0, 1]))
    with torch.no_grad():
        exact = model(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(*inputs).float()
    assert (exact - rough).abs().mean() < 0.05 * exact.abs().mean()


def test_a_fresh_network_predicts_zero():
    model = create_diffusion_unet(32, 1, [1, 2], [2], 2, num_head_channels=32)
    assert not model(randn(0, 1, 3, 16, 16), torch.tensor([5]), torch.tensor([0])).any()


def test_a_size_that_does_not_fit_is_refused_with_the_nearest():
    model = create_diffusion_unet(32, 1, [1, 2, 2], [4], 2, num_head_channels=32)
    with pytest.raises(UsageError, match=r"\[16, 20\]"):
        model(randn(0, 1, 3, 17, 19), torch.tensor([5]), torch.tensor([0]))


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(UsageError, match="96 channels"):
        create_diffusion_unet(96, 1, [1], [1], 2, num_head_channels=64)


def test_attention_and_group_norm_compute_in_float32_under_autocast():
    q, k, v = (torch.randn(1, 2, 5, 8) * 300 for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    seen = []
    norm = GroupNorm32(32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attend(q, k, v), expected)
        # Logits of 1e5 would be infinite in half precision.
        assert attend(q.half(), k.half(), v.half()).isfinite().all()
        values = torch.randn(1, 32, 4, 4) * 1e3 + 1e4
        seen.append(norm(values.bfloat16()))
    exact = norm(values.bfloat16().float())
    torch.testing.assert_close(seen[0].float(), exact, atol=0.02, rtol=0.02)


def test_windowed_attention_attends_within_each_window_only():
    block = AttentionBlock(32, num_head_channels=32, window=4)
    fill(block)
    x = randn(0, 2, 32, 8, 6)
    # Windows of at most 4x4: two rows of 4, two columns of 3.
    expected = torch.cat([torch.cat([block(p) for p in rows.chunk(2, 3)], 3) for rows in x.chunk(2, 2)], 2)
    assert torch.equal(block(x), expected)
    changed = x.clone()
    changed[..., 4:, 3:] += 1
    same = torch.isclose(block(changed), block(x)).all(dim=1)
    assert same[:, :4].all()
    assert same[:, :, :3].all()
    assert not same[:, 4:, 3:].any()
    whole = AttentionBlock(32, num_head_channels=32)
    whole.load_state_dict(block.state_dict())
    assert torch.equal(block(x[..., :4, :4]), whole(x[..., :4, :4]))
    assert not torch.allclose(block(x), whole(x))
