import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sdas.schedule import beta_schedule, kept_timesteps, respaced_betas
from utils.errors import UsageError


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
    assert kept_timesteps(1000, "ddim20") == list(range(0, 1000, 50))
    assert kept_timesteps(1000, "ddim1000") == list(range(1000))
    # Only stride 3 gives 334 steps; each stride in 500 .. 999 gives 2.
    assert kept_timesteps(1000, "ddim334")[1] == 3
    assert kept_timesteps(1000, "ddim2") == [0, 500]


def test_an_impossible_ddim_count_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="ddim334"):
        kept_timesteps(1000, "ddim330")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_sections_keep_their_counts_from_first_to_last(counts):
    kept = kept_timesteps(100, ",".join(map(str, counts)))
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
    assert kept_timesteps(10, [2, 3]) == [0, 4, 5, 7, 9]
    assert kept_timesteps(10, 4) == [0, 3, 6, 9]


def test_respaced_process_keeps_the_cumulative_products():
    betas = beta_schedule("linear", 1000)
    kept = kept_timesteps(1000, "10,10,20")
    respaced = respaced_betas(betas, kept)
    np.testing.assert_allclose(np.cumprod(1 - respaced), np.cumprod(1 - betas)[kept], rtol=1e-12)
