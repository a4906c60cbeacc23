"""Shared by the commands: paths of settings and outputs, and error reports."""

import argparse
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from utils import distributed
from utils.errors import RunError, Stopped, UsageError
from utils.names import shown

log = logging.getLogger("realnet")

SECONDS_FOR_RANK_0 = 5.0


def log_next(script: str, args: argparse.Namespace) -> None:
    """Print the command that follows, for the same data set and classes."""
    names = (("--dataset", args.dataset), ("--config", args.config), ("--class_name", args.class_name))
    options = " ".join(f"{option} {shlex.quote(value)}" for option, value in names if value)
    log.info("Next: python %s %s", script, options)


def predict_command(checkpoint: str | Path, options: str = "") -> str:
    """The command that scores new images with a checkpoint, or with an exported model."""
    return f"predict.py --checkpoint {shlex.quote(str(checkpoint))}{options} --input NEW_IMAGES --output results"


def config_path(args: argparse.Namespace, name: str) -> Path:
    """The settings file: --config ({} stands for the data set), else experiments/<dataset>/<name>.yaml."""
    if args.config:
        return _given_config(args)
    if not args.dataset:
        known = _datasets_with(name)
        raise UsageError(f"--dataset is missing; {Path('experiments').resolve()} has {', '.join(known) or 'none'}")
    path = Path("experiments") / args.dataset / f"{name}.yaml"
    if not path.is_file():
        if name == "classifier" and path.with_name("diffusion.yaml").is_file():
            reason = "prepare_data.py writes it for several classes only; with one, there is nothing to guide by"
            raise UsageError(f"--dataset {args.dataset}: {path} does not exist; {reason}")
        known = _datasets_with(name)
        where = f"{Path('experiments').resolve()} has {', '.join(known) or f'no folder with a {name}.yaml'}"
        raise UsageError(f"--dataset {args.dataset}: {path} does not exist; {where}")
    return path


def _datasets_with(name: str) -> list[str]:
    return sorted(path.parent.name for path in Path("experiments").glob(f"*/{name}.yaml"))


def experiment_dir(args: argparse.Namespace) -> Path:
    """The folder for outputs: that of --config, as in the reference program, else experiments/<dataset>/."""
    return _given_config(args).parent if args.config else Path("experiments") / args.dataset


def _given_config(args: argparse.Namespace) -> Path:
    return Path(args.config.replace("{}", args.dataset) if args.dataset else args.config)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write under a path into a one-line error."""
    try:
        yield
    except FileExistsError:
        raise UsageError(f"{path}: a file of this name, or earlier results, already exist") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error


def run(main: Callable[[], None]) -> None:
    """Run a script's main and turn its errors into one or two lines on stderr: exit 2 for wrong use, 1 for failures."""
    try:
        main()
    except (UsageError, RunError) as error:
        if os.environ.get("REALNET_DEBUG"):
            raise
        _report(_message(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
    except (MemoryError, RuntimeError) as error:
        lack = _lack_of_memory(error)
        if lack and not os.environ.get("REALNET_DEBUG"):
            _report(lack)
            sys.exit(1)
        if isinstance(error, MemoryError) or not distributed.is_lost_connection(error):
            raise
        # A failed rank reports the cause itself; this message is for a rank that was killed and could not.
        time.sleep(2 * SECONDS_FOR_RANK_0)
        _report("the connection to another rank is lost; it has ended, see its message")
        sys.exit(1)
    except BrokenPipeError:
        # The reader closed the pipe, as in `... | head`. Python's flush at exit would fail, so it goes to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # A disk that is full or read-only, a file that may not be opened.
        if os.environ.get("REALNET_DEBUG"):
            raise
        _report(f"{error.filename or 'a file'}: {error.strerror or error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _lack_of_memory(error: Exception) -> str | None:
    """What to do about an error that means too little memory; None if it means something else."""
    text = " ".join(_message(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"{str(error).splitlines()[0]} A smaller dataset.batch_size or trainer.amp: bf16 needs less memory"
    if "bus error" in text.lower() or "shared memory" in text or ("torch_" in text and "No space left" in text):
        return (
            "shared memory (/dev/shm) is full; set dataset.workers: 0 and dataset.cache_mb: 0, or enlarge it "
            "(docker run --shm-size=8g)"
        )
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        reason = text.split(". ", 1)[0]
        return f"{reason}, probably because memory ran out; lower dataset.workers or dataset.batch_size"
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return (
            f"memory ran out ({text[:120] or 'MemoryError'}); lower dataset.batch_size, dataset.workers or "
            "dataset.cache_mb, or close other programs"
        )
    return None


def _report(text: str) -> None:
    """Print an error once: rank 0 immediately, other ranks only if the same error did not end rank 0 too."""
    if not distributed.is_main():
        # If rank 0 ended with the same error, the launcher ends this rank during the wait.
        time.sleep(SECONDS_FOR_RANK_0)
        text = f"rank {os.environ.get('RANK')}: {text}"
    print(f"error: {shown(text)}", file=sys.stderr, flush=True)


def _message(error: Exception) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:
        # A loader worker raised it and put the message at the end of its traceback.
        return text.splitlines()[-1].partition(": ")[2]
    return text
