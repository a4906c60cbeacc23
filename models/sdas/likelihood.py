"""The terms of the variational bound: KL divergence and discretised likelihood (Ho et al. 2020, section 3)."""

import math

import torch


def normal_kl(mean1: torch.Tensor, log_var1: torch.Tensor, mean2: torch.Tensor, log_var2: torch.Tensor) -> torch.Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) per element, in nats."""
    return 0.5 * (log_var2 - log_var1 + (log_var1 - log_var2).exp() + (mean1 - mean2) ** 2 * (-log_var2).exp() - 1.0)


def discretized_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log probability of 8-bit values in [-1, 1] under a Gaussian integrated over each value's bin, in nats.

    The normal CDF is approximated by tanh, as in the training of the published models.
    """
    centred, inverse = x - mean, (-log_scale).exp()
    upper = _approximate_cdf(inverse * (centred + 1 / 255))
    lower = _approximate_cdf(inverse * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _approximate_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
