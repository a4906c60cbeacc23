"""The diffusion process: training loss, samplers with anomaly strength s (ancestral, DDIM, DPM-Solver++), inversion.

Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (learned variance, respacing), Song et al. 2021 (DDIM),
Dhariwal & Nichol 2021 (guidance), Zhang et al. 2024 (RealNet, eq. 4: the variance scaled by 1 + s), Lu et al. 2022
(DPM-Solver++, arXiv 2211.01095).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from models.sdas.likelihood import discretized_log_likelihood, normal_kl
from models.sdas.noise import Generators, draw_noise
from models.sdas.schedule import beta_schedule, extrapolation_weights, kept_timesteps, respaced_betas
from utils.device import to_device

Strength = float | torch.Tensor
AfterStep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class SpacedDiffusion:
    """A (possibly respaced) Gaussian diffusion process with learned or fixed reverse variance.

    In this class, t (N,) int64 indexes the respaced process, 0 .. num_timesteps - 1; the model and the guidance
    function get the original timesteps. Tables are float64.

    Args:
        T: number of original timesteps.
        section_counts: which timesteps to keep, see schedule.kept_timesteps.
        beta_scheduler: see schedule.beta_schedule.
        rescale_timesteps: give the model timesteps scaled to 0 .. 1000.

    Example:
        >>> process = SpacedDiffusion(1000, "ddim20", "linear")
        >>> process.num_timesteps, process.timestep_map[:3]
        (20, [0, 50, 100])
        >>> process.q_sample(torch.zeros(2, 3, 8, 8), torch.tensor([0, 19])).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self, T: int, section_counts: str | int | Sequence[int], beta_scheduler: str, rescale_timesteps: bool = False
    ) -> None:
        self.original_timesteps = T
        self.rescale_timesteps = rescale_timesteps
        betas = beta_schedule(beta_scheduler, T)
        self.timestep_map = kept_timesteps(betas, section_counts)
        self.betas = respaced_betas(betas, self.timestep_map)
        self.num_timesteps = len(self.betas)

        self._on_device: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._make_tables()

    def _make_tables(self) -> None:
        """Compute the tables over t, each (num_timesteps,) float64."""
        alphas = 1.0 - self.betas
        self.log_betas = np.log(self.betas)
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)
        # The posterior q(x_{t-1} | x_t, x_0), DDPM eq. 7.
        self.posterior_variance = self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)
        # The variance at t = 0 is 0, which has no logarithm; use the one at t = 1.
        clipped = self.posterior_variance.copy()
        clipped[0] = clipped[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(clipped)
        # For networks that do not predict the variance: beta, but the clipped posterior variance at t = 0.
        self.fixed_log_variance = np.log(np.append(np.exp(self.posterior_log_variance_clipped[0]), self.betas[1:]))
        self.extrapolation = extrapolation_weights(self.alphas_cumprod)

    def _at(self, table: str, t: torch.Tensor) -> torch.Tensor:
        """A table's values at t, float32, shaped (N, 1, 1, 1); each table is moved to a device once."""
        key = (table, t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.as_tensor(getattr(self, table), dtype=torch.float64).float().to(t.device)
        return self._on_device[key][t][:, None, None, None]

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """The timesteps to give the network for t: the original ones (N,), float if rescaled to 0 .. 1000."""
        key = ("timestep_map", t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self.timestep_map, device=t.device)
        original = self._on_device[key][t]
        return original.float() * (1000.0 / self.original_timesteps) if self.rescale_timesteps else original

    # ---- forward process -----------------------------------------------------------------------------------------

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Draw x_t ~ q(x_t | x_0), DDPM eq. 4. x_start (N,3,H,W) in [-1, 1]; noise standard normal, same shape."""
        if noise is None:
            noise = torch.randn_like(x_start)
        return self._at("sqrt_alphas_cumprod", t) * x_start + self._at("sqrt_one_minus_alphas_cumprod", t) * noise

    def _posterior_mean(self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self._at("posterior_mean_coef1", t) * x_start + self._at("posterior_mean_coef2", t) * x_t

    def _xstart_from_eps(self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return self._at("sqrt_recip_alphas_cumprod", t) * x_t - self._at("sqrt_recipm1_alphas_cumprod", t) * eps

    def _eps_from_xstart(self, x_t: torch.Tensor, t: torch.Tensor, x_start: torch.Tensor) -> torch.Tensor:
        return (self._at("sqrt_recip_alphas_cumprod", t) * x_t - x_start) / self._at("sqrt_recipm1_alphas_cumprod", t)

    # ---- reverse process -----------------------------------------------------------------------------------------

    def _call(self, model: Callable, x: torch.Tensor, t: torch.Tensor, model_kwargs: dict | None) -> torch.Tensor:
        return model(x, self.model_timesteps(t), **(model_kwargs or {})).float()

    def p_mean_variance(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """The learned p(x_{t-1} | x_t).

        Args:
            model: model(x, original t, **model_kwargs) -> (N,6,H,W) eps and v, or (N,3,H,W) eps (then the variance
                is fixed to beta, at t = 0 to the clipped posterior variance).
            clip_denoised: clip the predicted x_0 to [-1, 1].

        Returns:
            mean, variance, log_variance, pred_xstart, each (N,3,H,W).
        """
        return self._distribution(self._call(model, x, t, model_kwargs), x, t, clip_denoised)

    def _distribution(
        self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor, clip_denoised: bool
    ) -> dict[str, torch.Tensor]:
        channels = x.shape[1]
        eps = output[:, :channels]
        if output.shape[1] == 2 * channels:
            # v interpolates the log variance between its bounds, Nichol & Dhariwal eq. 15.
            fraction = (output[:, channels:] + 1) / 2
            lower, upper = self._at("posterior_log_variance_clipped", t), self._at("log_betas", t)
            log_variance = fraction * upper + (1 - fraction) * lower
        else:
            log_variance = self._at("fixed_log_variance", t).expand_as(x)
        pred_xstart = self._xstart_from_eps(x, t, eps)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = self._posterior_mean(pred_xstart, x, t)
        return {
            "mean": mean,
            "variance": log_variance.exp(),
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    @torch.no_grad()
    def p_sample(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor,
        s: Strength = 0.0,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One ancestral step: mean + variance * gradient + sqrt(1 + s) * sigma * noise (RealNet, eq. 4).

        Args:
            s: anomaly strength >= 0, a number or (N,).
            cond_fn: cond_fn(x, original t, **model_kwargs) -> c * grad_x log p(y | x_t), or None.
            noise: (N,3,H,W) standard normal; drawn if None; not used at t = 0.

        Returns:
            sample and pred_xstart, each (N,3,H,W).
        """
        out = self.p_mean_variance(model, x, t, model_kwargs=model_kwargs)
        mean = out["mean"]
        if cond_fn is not None:
            mean = mean + out["variance"] * cond_fn(x, self.model_timesteps(t), **(model_kwargs or {})).float()
        if noise is None:
            noise = torch.randn_like(x)
        scale = torch.sqrt(1 + _per_image(s, x)) * _not_first(t)
        return {"sample": mean + scale * (0.5 * out["log_variance"]).exp() * noise, "pred_xstart": out["pred_xstart"]}

    @torch.no_grad()
    def ddim_sample(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor,
        eta: float = 0.0,
        s: Strength = 0.0,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One DDIM step (Song et al. eq. 12) plus sqrt(s) * sigma * noise, where sigma^2 is the learned variance.

        Arguments as in p_sample; eta in [0, 1] interpolates between DDIM and DDPM. Guidance shifts eps
        (Dhariwal & Nichol, algorithm 2).
        """
        pred_xstart, eps, variance = self._guided(model, x, t, cond_fn, model_kwargs)
        alpha_bar, alpha_bar_prev = self._at("alphas_cumprod", t), self._at("alphas_cumprod_prev", t)
        eta_variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        mean = pred_xstart * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - eta_variance).clamp(min=0).sqrt() * eps
        if noise is None:
            noise = torch.randn_like(x)
        sigma = (eta_variance + _per_image(s, x) * variance).sqrt()
        return {"sample": mean + _not_first(t) * sigma * noise, "pred_xstart": pred_xstart}

    def _guided(
        self, model: Callable, x: torch.Tensor, t: torch.Tensor, cond_fn: Callable | None, model_kwargs: dict | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_0, eps and the learned variance; guidance shifts eps (Dhariwal & Nichol, algorithm 2), and so x_0."""
        out = self.p_mean_variance(model, x, t, model_kwargs=model_kwargs)
        pred_xstart = out["pred_xstart"]
        eps = self._eps_from_xstart(x, t, pred_xstart)
        if cond_fn is not None:
            gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {})).float()
            eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t) * gradient
            pred_xstart = self._xstart_from_eps(x, t, eps)
        return pred_xstart, eps, out["variance"]

    def p_sample_loop(
        self,
        model: Callable,
        noise: torch.Tensor,
        s: Strength = 0.0,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        generator: Generators = None,
        progress: bool = False,
        start: Sequence[int] | None = None,
        after_step: AfterStep | None = None,
    ) -> torch.Tensor:
        """Draw x_0 (N,3,H,W) from x_T = noise by ancestral steps.

        Args:
            generator: source of the steps' noise; a list holds one per image, so that an image does not depend on
                its batch.
            progress: show a progress bar over the steps, if there is a terminal.
            start: the timestep that each image begins at, where `noise` holds its x_t; None: all at the last one.
            after_step: after_step(t, x_{t-1}, predicted x_0) -> what takes the place of x_{t-1}. Of an image that has
                not begun yet, both are the image as it is, and it stays so, whatever is returned for it.
        """
        step = partial(self.p_sample, model, s=s, cond_fn=cond_fn, model_kwargs=model_kwargs)
        return self._loop(step, noise, generator, progress, start, after_step)

    def ddim_sample_loop(
        self,
        model: Callable,
        noise: torch.Tensor,
        eta: float = 0.0,
        s: Strength = 0.0,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        generator: Generators = None,
        progress: bool = False,
        start: Sequence[int] | None = None,
        after_step: AfterStep | None = None,
    ) -> torch.Tensor:
        """Draw x_0 (N,3,H,W) from x_T = noise by DDIM steps; arguments as in p_sample_loop and ddim_sample."""
        step = partial(self.ddim_sample, model, eta=eta, s=s, cond_fn=cond_fn, model_kwargs=model_kwargs)
        return self._loop(step, noise, generator, progress, start, after_step)

    @torch.no_grad()
    def dpm_solver_sample_loop(
        self,
        model: Callable,
        noise: torch.Tensor,
        stochastic: bool = True,
        s: Strength = 0.0,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        generator: Generators = None,
        progress: bool = False,
        start: Sequence[int] | None = None,
        after_step: AfterStep | None = None,
    ) -> torch.Tensor:
        """Draw x_0 (N,3,H,W) from x_T = noise by DPM-Solver++(2M), algorithm 2, or its SDE (Lu et al. 2022).

        A step replaces x_0 by D, on the line through x_0 and the x_0 of the step before (extrapolation_weights). The
        ODE solver then takes the DDIM step; the SDE solver draws from the posterior q(x_{t-1} | x_t, x_0 = D), with its
        variance times 1 + s (RealNet, eq. 4). The learned variance is not used. Guidance shifts eps as in ddim_sample;
        x_0 is clipped after it too. Few steps are best spaced by "logsnrN", see schedule.kept_timesteps.

        Args:
            stochastic: the SDE solver; the ODE solver adds no noise, so that s is not used.
            s, cond_fn, generator, progress, start, after_step: as in p_sample and p_sample_loop.
        """
        previous = None
        begins = None if start is None else to_device(torch.tensor(start), noise.device)

        def step(x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
            nonlocal previous
            pred_xstart = self._guided(model, x, t, cond_fn, model_kwargs)[0].clamp(-1, 1)
            past = pred_xstart if previous is None else previous
            weight = self._at("extrapolation", t)
            if begins is not None:
                weight = weight * (t < begins)[:, None, None, None]  # nothing lies before an image's first step
            previous, ahead = pred_xstart, pred_xstart + weight * (pred_xstart - past)
            if stochastic:
                # The posterior's variance is 0 at t = 0.
                sigma = ((1 + _per_image(s, x)) * self._at("posterior_variance", t)).sqrt()
                drawn = self._posterior_mean(ahead, x, t) + sigma * noise
                return {"sample": drawn, "pred_xstart": pred_xstart}
            alpha_bar_prev = self._at("alphas_cumprod_prev", t)
            eps = self._eps_from_xstart(x, t, ahead)
            drawn = ahead * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev).sqrt() * eps
            return {"sample": drawn, "pred_xstart": pred_xstart}

        return self._loop(step, noise, generator, progress, start, after_step)

    def sample_loop(self, sampler: str) -> Callable:
        """The loop of a sampler by its name in the settings: ancestral, ddim, dpmpp_2m or dpmpp_2m_sde."""
        return {
            "ancestral": self.p_sample_loop,
            "ddim": self.ddim_sample_loop,
            "dpmpp_2m": partial(self.dpm_solver_sample_loop, stochastic=False),
            "dpmpp_2m_sde": self.dpm_solver_sample_loop,
        }[sampler]

    def _loop(
        self,
        step: Callable,
        x: torch.Tensor,
        generator: Generators,
        progress: bool,
        start: Sequence[int] | None,
        after_step: AfterStep | None,
    ) -> torch.Tensor:
        """Take a step at every t, from each image's start down to 0, each with new noise."""
        begins = [self.num_timesteps - 1] * len(x) if start is None else list(start)
        timesteps = range(max(begins), -1, -1)
        for i in tqdm(timesteps, desc="steps", leave=False, disable=None if progress else True):
            t = torch.full((len(x),), i, device=x.device)
            begun = [i <= begin for begin in begins]
            out = step(x, t, noise=draw_noise(x, generator, begun))
            has_begun = None if all(begun) else to_device(torch.tensor(begun), x.device)[:, None, None, None]
            drawn, pred_xstart = (_where(has_begun, values, x) for values in (out["sample"], out["pred_xstart"]))
            if after_step is not None:
                drawn = _where(has_begun, after_step(i, drawn, pred_xstart), x)
            x = drawn
        return x

    @torch.no_grad()
    def ddim_reverse_sample_loop(
        self, model: Callable, x: torch.Tensor, model_kwargs: dict | None = None
    ) -> torch.Tensor:
        """Deterministic inversion x_0 -> x_T by Euler steps of the DDIM ODE (Song et al. 2021, section 4.3).

        ddim_sample_loop maps the result back to about x: the error of a step is that of predicting eps at the wrong end
        of it, and vanishes with the number of steps only.
        """
        for i in range(self.num_timesteps):
            t = torch.full((len(x),), i, device=x.device)
            out = self.p_mean_variance(model, x, t, model_kwargs=model_kwargs)
            eps = self._eps_from_xstart(x, t, out["pred_xstart"])
            alpha_bar_next = self._at("alphas_cumprod_next", t)
            x = out["pred_xstart"] * alpha_bar_next.sqrt() + (1 - alpha_bar_next).sqrt() * eps
        return x

    # ---- training ------------------------------------------------------------------------------------------------

    def training_losses(
        self,
        model: Callable,
        x_start: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """MSE of eps plus the variational bound of the learned variance (Nichol & Dhariwal, eq. 16, weight 1).

        Args:
            x_start: (N,3,H,W) in [-1, 1].
            t: (N,) timesteps.
            noise: (N,3,H,W) standard normal; drawn if None.

        Returns:
            loss, mse, vb (bits per dimension; 0 if the variance is not learned), each (N,).
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise)
        output = self._call(model, x_t, t, model_kwargs)
        channels = x_start.shape[1]
        eps = output[:, :channels]
        mse = _image_mean((noise - eps) ** 2)
        if output.shape[1] == 2 * channels:
            # eps is detached: the bound trains the variance only.
            vb = self._vb_bits(torch.cat([eps.detach(), output[:, channels:]], dim=1), x_start, x_t, t)
        else:
            vb = torch.zeros_like(mse)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _vb_bits(self, output: torch.Tensor, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p) (N,) in bits per dimension; at t = 0, -log p(x_0 | x_1)."""
        true_mean = self._posterior_mean(x_start, x_t, t)
        true_log_variance = self._at("posterior_log_variance_clipped", t)
        learned = self._distribution(output, x_t, t, clip_denoised=False)
        kl = normal_kl(true_mean, true_log_variance, learned["mean"], learned["log_variance"])
        nll = -discretized_log_likelihood(x_start, learned["mean"], 0.5 * learned["log_variance"])
        return torch.where(t == 0, _image_mean(nll), _image_mean(kl)) / math.log(2.0)


def start_of(process: SpacedDiffusion, depth: float) -> int:
    """The timestep of the process that an image is noised to: the kept one nearest to `depth` in 0 .. 1 of all T.

    Example:
        >>> start_of(SpacedDiffusion(1000, "ddim20", "linear"), 0.4)
        8
    """
    kept = np.array(process.timestep_map)
    return int(np.abs(kept - depth * (process.original_timesteps - 1)).argmin())


def _per_image(s: Strength, x: torch.Tensor) -> torch.Tensor:
    # A number is filled in on the device; copying it there would wait for the device.
    values = s.to(x) if isinstance(s, torch.Tensor) else torch.full((1,), s, dtype=x.dtype, device=x.device)
    return values.reshape(-1, 1, 1, 1)


def _where(mask: torch.Tensor | None, values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`values` where the mask is True, or everywhere without one."""
    return values if mask is None else torch.where(mask, values, others)


def _not_first(t: torch.Tensor) -> torch.Tensor:
    return (t != 0).float()[:, None, None, None]


def _image_mean(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(dim=1)
