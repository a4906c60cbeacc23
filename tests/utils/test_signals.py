"""The first signal is answered at once, and heeded between steps, between batches, and by all ranks together."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import REPOSITORY, two_ranks
from tests.quick_start import Process
from utils import distributed, signals
from utils.distributed import Run
from utils.errors import Stopped
from utils.log import progress_bar
from utils.signals import StopRequest, stop_requests

ALONE = Run(0, 1, torch.device("cpu"))
ANSWER = "SIGTERM: stopping, and saving if there is something to save; once more ends at once"
PROGRAM = """
import sys, time, torch
from utils import cli
from utils.distributed import Run
from utils.log import progress_bar
from utils.signals import stop_requests

def main():
    run = Run(int(sys.argv[1]), 2, torch.device("cpu"))
    with stop_requests(run) as stop:
        print("ready", flush=True)
        time.sleep(float(sys.argv[2]))  # a long step: the answer does not wait for it
        for item in progress_bar(range(10), run, "batches", stop=stop):
            print("batch", item, flush=True)

cli.run(main)
"""


def test_the_first_signal_is_answered_at_once_and_heeded_at_the_next_batch():
    process = Process(["-c", PROGRAM, "0", "4"], REPOSITORY, {})
    process.wait_for("ready\n")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait_for(ANSWER + "\n")
    assert time.monotonic() - began < 2
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == (f"ready\n{ANSWER}\n", "", 128 + signal.SIGTERM)


def test_on_a_terminal_the_answer_is_on_stderr():
    pty = pytest.importorskip("pty")
    terminal, screen = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, "0", "1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=screen)
    os.close(screen)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    shown = os.read(terminal, 1000).decode()
    assert shown.split() == ANSWER.split()
    assert process.communicate(timeout=30)[0] == ""
    os.close(terminal)


def test_only_rank_0_answers():
    process = Process(["-c", PROGRAM, "1", "1"], REPOSITORY, {})
    process.wait_for("ready\n")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("ready\n", "")
    assert process.returncode == 128 + signal.SIGTERM


def test_a_phase_without_steps_ends_between_two_batches():
    request = StopRequest(ALONE)
    seen = []

    def validate() -> None:
        for item in progress_bar(iter(range(10)), ALONE, "validation", total=10, stop=request):
            seen.append(item)
            request.signal = signal.SIGINT if item == 3 else 0

    with pytest.raises(Stopped) as stopped:
        validate()
    assert seen == [0, 1, 2, 3]
    assert stopped.value.signal == signal.SIGINT
    assert list(progress_bar([1, 2], ALONE, "validation", stop=StopRequest(ALONE))) == [1, 2]
    assert list(progress_bar([1, 2], ALONE, "validation")) == [1, 2]


def test_a_rank_that_waits_for_a_stopped_one_stops_too():
    def wait(received: int, text: str) -> None:
        with stop_requests(ALONE) as request:
            request.signal = received
            raise RuntimeError(text)

    lost = "[gloo] Connection closed by peer [127.0.0.1]:3"
    with pytest.raises(Stopped) as stopped:
        wait(signal.SIGTERM, lost)
    assert stopped.value.signal == signal.SIGTERM
    with pytest.raises(RuntimeError, match="closed by peer"):
        wait(0, lost)
    with pytest.raises(RuntimeError, match="shapes"):
        wait(signal.SIGTERM, "shapes cannot be multiplied")


def test_a_progress_bar_knows_how_much_is_left():
    assert progress_bar([1, 2, 3], ALONE, "validation", stop=StopRequest(ALONE)).total == 3


def test_one_process_stops_after_the_step():
    request = StopRequest(ALONE)
    answers = []
    for step in range(4):
        if step == 2:
            request.signal = signal.SIGTERM
        answers.append(request.agreed())
    assert answers == [0, 0, signal.SIGTERM, signal.SIGTERM]


def _agree_in_rank(run: Run, step_seconds: float) -> None:
    """A clock that both ranks read, in steps; one rank of two gets a signal in the 5th step."""
    clock = [0.0]
    signals.time = type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])})
    asked = []
    together = distributed.all_reduce_max
    distributed.all_reduce_max = lambda tensor: asked.append(step) or together(tensor)
    request = StopRequest(run)
    stopped_at = None
    for step in range(1, 31):
        clock[0] += step_seconds * (1 + run.rank)
        if step == 5 and run.rank == 1:
            request.signal = signal.SIGTERM
        if request.agreed():
            stopped_at = step
            break
    if step_seconds < 0.1:
        assert asked == [1, 11]
        assert stopped_at == 11
    else:
        # Steps of 3 s on the slower rank: a launcher kills after 30 s.
        assert asked == [1, 2, 3, 4, 5]
        assert stopped_at == 5
    assert distributed.gather(stopped_at) in (None, [stopped_at] * 2)


@pytest.mark.parametrize("step_seconds", [0.01, 1.5])
def test_ranks_ask_each_other_at_every_tenth_step_and_more_often_if_steps_are_slow(step_seconds):
    two_ranks(_agree_in_rank, step_seconds)
