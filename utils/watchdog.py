"""Ends a job one of whose ranks has fallen silent: stopped, frozen, or on a host that is gone.

Such a rank keeps its connections open, so that the others would wait for it for days. Each rank counts up in the
store of the launcher every few seconds, from a thread of its own, and looks whether the others do.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

BEAT_SECONDS = 5.0
# A launcher needs half a minute more to end a stopped rank: together less than two minutes.
SILENT_SECONDS = 60.0
DONE = b"done"


class Watchdog:
    """Watches the other ranks until it is stopped.

    Args:
        rank, world_size: of this process.
        give_up: what to do with the message about a silent rank; by default, print it and end this process.
    """

    def __init__(self, rank: int, world_size: int, give_up: Callable[[str], None] | None = None) -> None:
        self.rank, self.world_size, self.give_up = rank, world_size, give_up or self._end
        self.ended = threading.Event()
        now = time.monotonic()
        # When the store last answered, and when each rank's count last changed, with that count.
        self.answered, self.heard = now, {other: (b"", now) for other in range(world_size) if other != rank}
        # A connection of its own: that of the process group is busy while it waits.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.PrefixStore(
            f"alive/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
            dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SILENT_SECONDS)),
        )
        self.store.set(str(rank), "0")
        # Two threads, because the one that asks the store hangs when the store's process is stopped.
        for task in (self._ask, self._judge):
            threading.Thread(target=task, daemon=True).start()

    def stop(self) -> None:
        """End the watch: this rank is about to end, which the others have to know."""
        self.ended.set()

    def _ask(self) -> None:
        others = [str(other) for other in self.heard]
        count = 0
        try:
            while not self.ended.wait(BEAT_SECONDS):
                count += 1
                self.store.set(str(self.rank), str(count))
                for other, value in zip(self.heard, self.store.multi_get(others), strict=True):
                    if value != self.heard[other][0]:
                        self.heard[other] = (value, time.monotonic())
                self.answered = time.monotonic()
            self.store.set(str(self.rank), DONE.decode())
        except RuntimeError:
            # The store's process has ended, which ranks and launcher notice themselves.
            self.ended.set()

    def _judge(self) -> None:
        last = time.monotonic()
        while not self.ended.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - last > 3 * BEAT_SECONDS:
                # This process itself was stopped, so it has missed what the others said.
                self.answered, self.heard = now, {other: (value, now) for other, (value, _) in self.heard.items()}
            last = now
            heard = ((rank, at) for rank, (value, at) in self.heard.items() if value != DONE)
            silent = next((rank for rank, at in heard if now - at > SILENT_SECONDS), None)
            if silent is None and now - self.answered > SILENT_SECONDS:
                silent = 0  # whose process, or whose launcher, holds the store
            if silent is not None and not self.ended.is_set():
                self.give_up(
                    f"rank {silent} has not answered for {SILENT_SECONDS:g} s: its process is stopped, or its host is "
                    "gone; this job ends, and --resume continues it"
                )
                return

    def _end(self, text: str) -> None:
        print(f"error: rank {self.rank}: {text}", file=sys.stderr, flush=True)
        os._exit(1)
