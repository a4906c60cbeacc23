"""What is left of a job of several ranks, and for how long."""

import pytest
import torch

from utils import job_progress
from utils.distributed import Run
from utils.job_progress import JobProgress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(job_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_job_says_what_is_left_over_all_classes(clock, caplog):
    progress = JobProgress(100, 50, Run(0, 2, torch.device("cpu")))
    assert progress.summary == "100 of 100 images are left"
    with caplog.at_level("INFO", logger="realnet"):
        for name in ("dots", "lines"):
            for _ in range(2):
                clock[0] += 10
                progress.add(10, name)
    # 10 of this rank's 50 images take 10 seconds; a line comes after more than 12.
    lines = ["dots: 60 of 100 images are left, about 0:00:30", "lines: 20 of 100 images are left, about 0:00:10"]
    assert [record.message for record in caplog.records] == lines
    clock[0] += 10
    progress.add(10, "lines")
    assert progress.left == 0


def test_one_image_is_left_in_the_singular(clock):
    progress = JobProgress(8, 8, Run(0, 1, torch.device("cpu")))
    progress.add(7, "dots")
    assert progress.summary.startswith("1 of 8 images is left, about")
    assert JobProgress(1, 1, Run(0, 1, torch.device("cpu"))).summary == "1 of 1 image is left"


def test_a_rank_with_nothing_to_do_divides_by_nothing(clock):
    progress = JobProgress(3, 0, Run(1, 2, torch.device("cpu")))
    assert progress.left == 3
    assert JobProgress(0, 0, Run(0, 1, torch.device("cpu"))).left == 0
