"""Progress where there is no terminal, and tensorboard."""

import errno
import logging

import numpy as np
import torch

from utils import log as log_module
from utils.distributed import Run
from utils.log import PICTURES, TensorBoard, log, progress_bar, set_up_logging
from utils.signals import StopRequest


def test_long_phases_say_how_far_they_are_without_a_terminal(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    run = Run(0, 1, torch.device("cpu"))
    with caplog.at_level("INFO", logger="realnet"):
        for _ in progress_bar(list(range(5)), run, "AFS", stop=StopRequest(run)):
            now[0] += 7.0
    assert [record.message for record in caplog.records] == ["AFS: 2 of 5 done", "AFS: 4 of 5 done"]


def test_tensorboard_keeps_all_numbers_and_the_newest_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def add(steps):
        board = TensorBoard(tmp_path, keep=2)
        for step in steps:
            board.add_scalar("loss", step, step)
            for name in ("a", "b"):
                board.add_image(name, np.full((4, 4, 3), step, np.uint8), step)
        board.close()

    add([10, 20, 30])
    add([5])  # a new run, whose pictures are the newest although their step is lower
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [10, 20, 30, 5]
    pictures = EventAccumulator(str(tmp_path / PICTURES)).Reload()
    assert {name: [event.step for event in pictures.Images(name)] for name in "ab"} == {"a": [30, 5], "b": [30, 5]}
    assert len(list((tmp_path / PICTURES).iterdir())) == 2


def test_a_full_disk_under_log_and_tensorboard_is_said_once_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    board = set_up_logging(Run(0, 1, torch.device("cpu")), tmp_path, "train", 1)
    try:
        file = next(handler for handler in log.handlers if isinstance(handler, logging.FileHandler))
        monkeypatch.setattr(file.stream, "write", full, raising=False)
        monkeypatch.setattr(board.numbers, "add_scalar", full)
        for step in range(3):
            log.info("step %d", step)
            board.add_scalar("loss", 1.0, step)
    finally:
        board.close()
    captured = capsys.readouterr()
    assert captured.out.count("train.log: cannot be written (No space left on device)") == 1
    assert captured.out.count("tensorboard will lack what follows") == 1
    assert all(f"step {step}" in captured.out for step in range(3))
    assert captured.err == ""
