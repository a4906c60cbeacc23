"""A rank that falls silent ends the job."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.conftest import REPOSITORY
from tests.quick_start import Process
from utils import watchdog

PROGRAM = """
import sys, time
from utils import cli, distributed, watchdog

watchdog.BEAT_SECONDS, watchdog.SILENT_SECONDS = 0.3, 2.0

def main():
    with distributed.session("cpu") as run:
        print("runs", flush=True)
        for _ in range(400):
            distributed.barrier()
            time.sleep(0.1)

cli.run(main)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(program: str, **of_rank_1: str) -> list[Process]:
    port, processes = str(free_port()), []
    for rank in range(2):
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **ranks, **(of_rank_1 if rank else {})}
        processes.append(Process(["-c", program], REPOSITORY, environment))
    return processes


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_other_one_with_a_message(stopped):
    processes = start_ranks(PROGRAM)
    try:
        for process in processes:
            process.wait_for("runs\n")
        time.sleep(0.5)
        processes[stopped].send_signal(signal.SIGSTOP)
        _, err = processes[1 - stopped].communicate(timeout=30)
        assert processes[1 - stopped].returncode == 1
        assert f"error: rank {1 - stopped}: rank {stopped} has not answered for 2 s" in err
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_ranks_that_answer_or_have_ended_are_left_alone(monkeypatch):
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "SILENT_SECONDS", 0.6)
    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    messages: list[str] = []
    first, second = (watchdog.Watchdog(rank, 2, messages.append) for rank in range(2))
    time.sleep(1.5)
    assert messages == []
    second.stop()  # it ends as it should
    time.sleep(1.5)
    assert messages == []
    first.stop()
    del server


DIFFERENT = """
import os
from utils import cli, distributed

def main():
    settings = {"dataset": {"batch_size": int(os.environ["BATCH"])}}
    with distributed.session("cpu", {"settings": settings}) as run:
        print("runs", flush=True)

cli.run(main)
"""


def test_ranks_that_were_started_differently_end_at_once(monkeypatch):
    monkeypatch.setenv("BATCH", "4")
    processes = start_ranks(DIFFERENT, BATCH="8")
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 0 and rank 1 differ: settings.dataset.batch_size: 4 -> 8. Start all ranks alike" in outputs[0][1]
    assert all("runs" not in out and "Traceback" not in err for out, err in outputs)
