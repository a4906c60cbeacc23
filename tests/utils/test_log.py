"""Progress where there is no terminal."""

import torch

from utils import log as log_module
from utils.distributed import Run
from utils.log import progress_bar
from utils.signals import StopRequest


def test_long_phases_say_how_far_they_are_without_a_terminal(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    run = Run(0, 1, torch.device("cpu"))
    with caplog.at_level("INFO", logger="realnet"):
        for _ in progress_bar(list(range(5)), run, "AFS", stop=StopRequest(run)):
            now[0] += 7.0
    assert [record.message for record in caplog.records] == ["AFS: 2 of 5 done", "AFS: 4 of 5 done"]
