import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sdas.schedule import (
    beta_schedule,
    extrapolation_weights,
    half_log_snr,
    kept_timesteps,
    respaced_betas,
)
from utils.errors import UsageError

LINEAR = beta_schedule("linear", 1000)


def test_linear_betas_span_the_published_range():
    betas = beta_schedule("linear", 1000)
    assert betas[0] == pytest.approx(1e-4)
    assert betas[-1] == pytest.approx(0.02)
    assert np.diff(betas).std() < 1e-15


def test_cosine_betas_give_the_squared_cosine():
    alphas_cumprod = np.cumprod(1 - beta_schedule("cosine", 1000))
    times = (np.arange(1, 900) / 1000 + 0.008) / 1.008
    expected = np.cos(times * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alphas_cumprod[:899], expected, rtol=1e-9)


def test_const_betas():
    np.testing.assert_allclose(beta_schedule("const0.01", 500), 0.02)


@pytest.mark.parametrize("name", ["lineal", "const", "constx", "const3"])
def test_a_bad_schedule_is_named(name):
    with pytest.raises(UsageError, match=name):
        beta_schedule(name, 1000)


def test_ddim_takes_the_smallest_stride_that_gives_the_count():
    assert kept_timesteps(LINEAR, "ddim20") == list(range(0, 1000, 50))
    assert kept_timesteps(LINEAR, "ddim1000") == list(range(1000))
    # Only stride 3 gives 334 steps; each stride in 500 .. 999 gives 2.
    assert kept_timesteps(LINEAR, "ddim334")[1] == 3
    assert kept_timesteps(LINEAR, "ddim2") == [0, 500]


def test_an_impossible_ddim_count_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="ddim334"):
        kept_timesteps(LINEAR, "ddim330")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_sections_keep_their_counts_from_first_to_last(counts):
    kept = kept_timesteps(LINEAR[:100], ",".join(map(str, counts)))
    assert len(kept) == sum(counts)
    assert kept == sorted(set(kept))
    start = 0
    size, extra = divmod(100, len(counts))
    for i, count in enumerate(counts):
        length = size + (i < extra)
        section = [t for t in kept if start <= t < start + length]
        assert len(section) == count
        assert section[0] == start
        assert count == 1 or section[-1] == start + length - 1
        start += length


def test_a_list_and_a_number_of_sections():
    assert kept_timesteps(LINEAR[:10], [2, 3]) == [0, 4, 5, 7, 9]
    assert kept_timesteps(LINEAR[:10], 4) == [0, 3, 6, 9]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_logsnr_steps_are_even_in_the_log_of_the_signal_to_noise_ratio(name):
    betas = beta_schedule(name, 1000)
    kept = kept_timesteps(betas, "logsnr10")
    ratios = half_log_snr(np.cumprod(1 - betas))[kept]
    assert (kept[0], kept[-1]) == (0, kept_timesteps(betas, "ddim20")[-1])
    # Rounded to whole timesteps, which are 0.1 to 0.4 apart at the ends.
    np.testing.assert_allclose(-np.diff(ratios), (ratios[0] - ratios[-1]) / 9, atol=0.25)
    np.testing.assert_allclose(extrapolation_weights(np.cumprod(1 - betas)[kept])[2:-1], 0.5, atol=0.15)


@given(st.integers(1, 60), st.sampled_from(["linear", "cosine", "const0.01"]))
def test_logsnr_keeps_its_count_of_different_steps(count, name):
    kept = kept_timesteps(beta_schedule(name, 60), f"logsnr{count}")
    assert len(set(kept)) == count
    assert kept == sorted(kept)
    assert 0 <= kept[0] <= kept[-1] < 60


@pytest.mark.parametrize("counts", ["logsnr", "logsnr0", "logsnr1001", "logsnr4.5", "logsnr-3"])
def test_a_bad_logsnr_count_is_named(counts):
    with pytest.raises(UsageError, match=r"section_counts.*logsnr"):
        kept_timesteps(LINEAR, counts)


def test_extrapolation_is_in_log_snr_and_of_first_order_at_both_ends():
    ratios = np.array([4.0, 3.0, 1.0, 0.0, -4.0])
    weights = extrapolation_weights(1 / (1 + np.exp(-2 * ratios)))
    np.testing.assert_allclose(weights, [0, 0, 2 / (2 * 1), 1 / (2 * 4), 0])


def test_respaced_process_keeps_the_cumulative_products():
    kept = kept_timesteps(LINEAR, "10,10,20")
    respaced = respaced_betas(LINEAR, kept)
    np.testing.assert_allclose(np.cumprod(1 - respaced), np.cumprod(1 - LINEAR)[kept], rtol=1e-12)
