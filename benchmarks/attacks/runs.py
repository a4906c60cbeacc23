"""Runs one attack in this process, under an alarm, and says how it ended. For benchmarks/mutants.py."""

import contextlib
import faulthandler
import io
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml

from tests.conftest import make_data, settings
from utils import cli
from utils.errors import RunError, UsageError

REFUSED, ACCEPTED, TRACEBACK, HANG = "refused", "accepted", "traceback", "hang"
WATCHDOG = 90.0  # seconds after which even code that holds the interpreter is ended, with a traceback
LONGEST_LINE = 300
BAD_WORDS = ("weights_only", "Traceback", "REALNET_DEBUG")


class Hang(BaseException):
    """The alarm rang. No `except Exception` may swallow it."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Args:
        kind: REFUSED, ACCEPTED, TRACEBACK or HANG.
        code: the exit code.
        message: what was written to stderr, or the exception.
        out: what was written to stdout.
    """

    kind: str
    code: int
    message: str
    out: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """An attack that was tried; `survivor` says what is wrong with how it ended, or is empty."""

    name: str
    outcome: Outcome
    survivor: str = ""


def attempt(function: Callable[[], object], seconds: float = 10.0) -> Outcome:
    """Call a function; UsageError, RunError and exits with 1 or 2 count as refusals."""
    began, out, err = time.monotonic(), io.StringIO(), io.StringIO()
    kind, code, message = ACCEPTED, 0, ""
    before = signal.signal(signal.SIGALRM, _ring)
    faulthandler.dump_traceback_later(max(WATCHDOG, 3 * seconds), exit=True)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("default", append=True)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                function()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except (UsageError, RunError) as error:
        kind, code, message = REFUSED, 2 if isinstance(error, UsageError) else 1, str(error)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        kind = REFUSED if code in (1, 2) else ACCEPTED if code == 0 else TRACEBACK
    except Hang:
        kind, message = HANG, f"no end after {seconds:g} s"
    except BaseException as error:
        kind, message = TRACEBACK, _short_traceback(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
    return Outcome(kind, code, err.getvalue() + message, out.getvalue(), time.monotonic() - began)


def _ring(number: int, frame: FrameType | None) -> None:
    # Again soon, if something swallows the first one.
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    raise Hang


def _short_traceback(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "mutant" not in f.filename]
    own = [f for f in frames if ".venv" not in f.filename and "/lib/python" not in f.filename]
    shown = [f"{Path(f.filename).name}:{f.lineno}" for f in own[-3:]]
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:160]} [{' < '.join(reversed(shown))}]"


def command(main: Callable, arguments: Iterable[str], folder: Path, seconds: float = 10.0) -> Outcome:
    """Run a script's main in a folder, as tests/in_process.py does."""
    argv = sys.argv
    sys.argv = [main.__module__, *map(str, arguments)]
    try:
        with inside(folder):
            return attempt(lambda: cli.run(main), seconds)
    finally:
        sys.argv = argv


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make a folder the current one."""
    there = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(there)


def flaws(outcome: Outcome, lines: int = 2, names: Iterable[str] = ()) -> list[str]:
    """What is wrong with a refusal: too long, an internal word, or a name that it has to hold and does not."""
    if outcome.kind in (TRACEBACK, HANG):
        return [f"{outcome.kind}: {outcome.message.strip().splitlines()[-1] if outcome.message else ''}"]
    if outcome.kind == ACCEPTED:
        return []
    found = [f"says {word}" for word in BAD_WORDS if word in outcome.message]
    texts = outcome.message.strip().splitlines()
    if len(texts) > lines:
        found.append(f"{len(texts)} lines: {texts[0][:80]} ... {texts[-1][:80]}")
    longest = max((len(text) for text in texts), default=0)
    if longest > LONGEST_LINE:
        found.append(f"a line of {longest} letters")
    if not texts:
        found.append("says nothing")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\x9b]", outcome.message + outcome.out):
        found.append("control characters on the terminal")
    found += [f"does not name {name}" for name in names if name not in outcome.message]
    return found


class Yard:
    """The workspace of attacks, deep in a folder whose other contents must not change.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.space = root / "outer/middle/inner/space"
        self.space.mkdir(parents=True)
        (root / "outer/canary.txt").write_text("untouched")
        make_data(self.space / "data/tiny", train=4, good=2, bad=2)
        for name, config in settings("data/tiny", "experiments/tiny").items():
            self.write(self.space / f"experiments/tiny/{name}.yaml", config)
        self.seen = self.outside()

    def write(self, path: Path, config: dict) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    def outside(self) -> set[str]:
        """Everything outside the workspace, and anything an attack would leave in it."""
        found = {str(path) for path in self.root.rglob("*") if not path.is_relative_to(self.space)}
        return found | {str(path) for path in self.space.rglob("*OWNED*") if path.name == "OWNED"}

    def broken_out(self) -> list[str]:
        """What appeared or vanished outside since the last call."""
        now = self.outside()
        changed = sorted(now ^ self.seen)
        for path in self.space.rglob("OWNED"):
            path.unlink()  # so that the next attack is seen too
        self.seen = self.outside()
        parts = [str(path) for path in self.space.rglob(".part-*")]
        return [f"wrote {path}" for path in changed] + [f"leftover: {path}" for path in parts]


def verdict(outcome: Outcome, yard: Yard, allowed: bool, lines: int = 2) -> str:
    """What is wrong with how an attack ended."""
    problems = flaws(outcome, lines) + yard.broken_out()
    if outcome.kind == ACCEPTED and not allowed:
        problems.append("accepted")
    if outcome.kind == ACCEPTED and "Warning" in outcome.message:
        problems.append(f"a warning of Python: {outcome.message.strip().splitlines()[0][-120:]}")
    return "; ".join(problems)


def trained(yard: Yard) -> Iterator[Outcome]:
    """Train the small networks once: realnet (evaluated), classifier and diffusion; yields how each step ended."""
    import evaluation_realnet
    import train_classifier
    import train_diffusion
    import train_realnet

    few = ["--set", "trainer.max_epoch=1", "--overwrite"]
    for main, arguments in (
        (train_realnet.main, ["--dataset", "tiny", "--class_name", "dots", *few]),
        (evaluation_realnet.main, ["--dataset", "tiny", "--class_name", "dots"]),
        (train_classifier.main, ["--dataset", "tiny", *few]),
        (train_diffusion.main, ["--dataset", "tiny", *few]),
    ):
        outcome = command(main, arguments, yard.space, 240)
        if outcome.kind != ACCEPTED:
            raise RuntimeError(f"{main.__module__} failed: {outcome.message}")
        yield outcome
