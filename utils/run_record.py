"""What a run is, written into its log folder: settings, command line, versions, device, commit."""

import hashlib
import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from utils.config import plain
from utils.distributed import Run
from utils.files import append_text, write_text

log = logging.getLogger("realnet")

PACKAGES = ("datasets", "evaluation", "models", "preparation", "utils")
REPOSITORY = Path(__file__).resolve().parent.parent


def log_run(run: Run) -> None:
    """Log the command, version, device and commit."""
    if not run.is_main:
        return
    found = code_commit()
    commit = f", commit {found}" if found else ""
    log.info("%s", _command())
    log.info("torch %s on %s x %d%s", torch.__version__, _device_name(run.device), run.world_size, commit)


def write_record(run: Run, log_dir: str | Path, name: str, config: Any) -> None:
    """Write <name>.settings.yaml and add a line to <name>.runs.jsonl in the log folder.

    Called once all that the run needs is loaded: a run that cannot begin has to leave the record of the one before.

    Args:
        name: of the script, without its ending.
        config: the settings with all defaults filled in.
    """
    if not run.is_main:
        return
    content = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": _command(),
        "commit": code_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "device": _device_name(run.device),
        "ranks": run.world_size,
        "host": platform.node(),
    }
    folder = Path(log_dir)
    path = folder / f"{name}.settings.yaml"
    write_text(path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
    append_text(folder / f"{name}.runs.jsonl", json.dumps(content, ensure_ascii=False) + "\n")
    log.info("settings in %s", path)


def identity_of(config: Any, **more: Any) -> dict[str, Any]:
    """What has to be the same on all ranks of a run: command, settings, code, version of torch, and more if given."""
    command = [word for word in sys.argv if not word.startswith(("--local-rank", "--local_rank"))]
    return {"settings": plain(config), "command": command, "code": _code(), "torch": torch.__version__, **more}


def _command() -> str:
    return shlex.join(sys.argv)


def _code() -> str:
    """A hash of the program's source files."""
    digest = hashlib.sha256()
    for path in sorted(
        [*REPOSITORY.glob("*.py"), *(p for name in PACKAGES for p in (REPOSITORY / name).rglob("*.py"))]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def code_commit() -> str | None:
    """The commit of the code, with + if files have changed since; None if it is not in a git checkout."""
    if not (REPOSITORY / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
