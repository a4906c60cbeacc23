"""Runs a user's command for one anomalous image after the other, in the background."""

import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from utils.errors import UsageError

log = logging.getLogger("realnet")

OPTION = "--on-anomaly"
SECONDS = 60  # after which a command is killed, since those behind it wait
PLACE = "{}"
BATCH_FILES = (".bat", ".cmd")  # Windows hands their arguments to a shell


def parse_command(text: str) -> list[str]:
    """The program and its arguments; no shell ever sees them.

    Args:
        text: as in a shell: quotes group words. The word {} stands for the image's path.

    Raises:
        UsageError: it is not a command, its program does not exist, or {} is part of a word.

    Example:
        >>> parse_command("echo 'two words' {}")
        ['echo', 'two words', '{}']
    """
    try:
        # On Windows, backslashes separate folders.
        words = shlex.split(text) if os.name != "nt" else [w.strip('"') for w in shlex.split(text, posix=False)]
    except ValueError as error:
        raise UsageError(f"{OPTION} {text!r}: {str(error).lower()}") from None
    if not words or shutil.which(words[0]) is None:
        raise UsageError(f"{OPTION} {text!r}: {words[0] if words else 'nothing'} is no program that can be run")
    # In a longer word, as of `sh -c "mail {}"`, the name of a file would be read as code.
    if any(PLACE in word and word != PLACE for word in words):
        raise UsageError(f"{OPTION} {text!r}: {PLACE} has to be a word of its own; a script reads $REALNET_IMAGE")
    if PLACE in words and words[0].lower().endswith(BATCH_FILES):
        raise UsageError(f"{OPTION} {text!r}: a batch file cannot take {PLACE} safely; it reads %REALNET_IMAGE%")
    return words


class CommandQueue:
    """Runs a command for each image that is added, one after the other; who adds one does not wait.

    A command that fails, or takes longer than SECONDS, is logged and does not stop the next one. Leaving the context
    waits until all have run. They have a session of their own, which Ctrl-C does not reach.

    Args:
        words: of parse_command; None runs nothing.
    """

    def __init__(self, words: list[str] | None) -> None:
        self.words = words
        self.waiting: queue.Queue = queue.Queue()
        self.thread = threading.Thread(target=self._run_all, name=OPTION, daemon=True)

    def __enter__(self) -> "CommandQueue":
        self.thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.waiting.qsize():
            log.info("%s: commands that are left to run: %d", OPTION, self.waiting.qsize())
        self.waiting.put(None)
        self.thread.join()

    def add(self, image: Path, variables: Mapping[str, str]) -> None:
        """Run the command for an image, with its absolute path in place of {} and as REALNET_IMAGE.

        Args:
            variables: further environment variables.
        """
        if self.words is not None:
            path = os.path.abspath(image)
            self.waiting.put((path, {"REALNET_IMAGE": path, **variables}))

    def _run_all(self) -> None:
        while (item := self.waiting.get()) is not None:
            path, variables = item
            problem = self._run([path if word == PLACE else word for word in self.words], variables)
            if problem:
                log.warning("warning: %s: %s for %s", OPTION, problem, path)

    def _run(self, words: list[str], variables: Mapping[str, str]) -> str:
        """Run one command; returns what went wrong, if anything."""
        environment = {**os.environ, **variables}
        try:
            process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            return f"{words[0]} cannot be run ({error.strerror or error})"
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(OSError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.wait()
            return f"killed after {SECONDS} seconds"
        return f"exit code {code}" if code else ""
