"""A queue of jobs that run as processes, several at a time. Signals are passed on; no process outlives the queue."""

import logging
import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from utils.errors import RunError, Stopped, UsageError
from utils.names import shown
from utils.signals import NAMES, signal_name

log = logging.getLogger("realnet")

POLL_SECONDS = 0.1
LOG_TAIL = 8192  # bytes at the end of a log in which its error is looked for
PROMPT = "$ "  # before each command in a log


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other.

    Args:
        name: for messages.
        commands: yields the next command once the one before has ended well, or None to be asked again a little later.
            What it raises as UsageError, RunError or OSError fails the job.
        log: file that gets what the processes print.
    """

    name: str
    commands: Iterator[Sequence[str] | None]
    log: Path


def run_jobs(jobs: Iterable[Job], places: Sequence[Mapping[str, str]]) -> Iterator[tuple[Job, str | None]]:
    """Run jobs, one at each place at a time; yields each job as it ends, with the reason if it failed, else None.

    A failed job does not end the others. SIGTERM, SIGINT and SIGUSR1 are passed on to the running processes, a second
    one too, and no further process starts.

    Args:
        places: the environment variables of each place, beside those of this process.

    Raises:
        Stopped: a signal has arrived, and all processes have ended.
    """
    waiting, running = deque(jobs), [_Place(variables) for variables in places]
    with _received() as signals:
        try:
            while waiting or any(place.job for place in running):
                if signals:
                    text = "%s: passed on to the running processes, which save their state; once more ends them at once"
                    log.info(text, signal_name(signals[0]))
                    _end(running, signals)
                    raise Stopped(signals[0])
                for place in running:
                    if place.job is None and waiting:
                        place.job = waiting.popleft()
                    if place.job is None or not place.advance():
                        continue
                    job, place.job = place.job, None
                    yield job, place.problem
                time.sleep(POLL_SECONDS)
        finally:
            # Nothing runs any more, unless the caller has failed or lost interest.
            _end(running, signals or [signal.SIGTERM])


@contextmanager
def _received() -> Iterator[list[int]]:
    """Collect the signals that arrive, in a list that grows."""
    signals: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        signals.append(number)

    before = {name: signal.signal(getattr(signal, name), receive) for name in NAMES}
    try:
        yield signals
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


class _Place:
    """Runs the commands of one job at a time."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        self.job: Job | None = None
        self.process: subprocess.Popen | None = None
        self.problem: str | None = None

    def advance(self) -> bool:
        """Start the job's next command if none is running; returns whether the job has ended."""
        self.problem = None
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return False
            self.process = None
            if code:
                ended = f"exit code {code}" if code > 0 else f"ended by {signal_name(-code)}"
                self.problem = f"{ended}: {last_words(self.job.log)}"
                return True
        try:
            command = next(self.job.commands)
            if command is not None:
                self._start(command)
        except StopIteration:
            return True
        except (UsageError, RunError) as error:
            self.problem = str(error)
            return True
        except OSError as error:
            self.problem = f"{error.filename or self.job.log}: {error.strerror or error}"
            return True
        return False

    def _start(self, command: Sequence[str]) -> None:
        self.job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.job.log, "ab", buffering=0) as log_file:
            log_file.write(f"{PROMPT}{shlex.join(command)}\n".encode("utf-8", "backslashreplace"))
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
            )


def _end(places: Sequence[_Place], signals: list[int]) -> None:
    """Send the processes every signal of a list that may grow meanwhile, and wait until they have ended."""
    passed = 0
    while left := [place.process for place in places if place.process is not None and place.process.poll() is None]:
        for number in signals[passed:]:
            for process in left:
                process.send_signal(number)
        passed = len(signals)
        time.sleep(POLL_SECONDS)


def last_words(log: Path) -> str:
    """What the last process in a log said last: its error message, else its last line."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
        text = file.read().decode("utf-8", "replace")
    lines = [line for line in text.rpartition(PROMPT)[2].splitlines()[1:] if line.strip()] or ["it printed nothing"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return shown([*lines, *errors][-1])[:300]
