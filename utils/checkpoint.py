"""Reading and writing checkpoints: never half-written, never any pickled code, and what a run resumes from."""

import logging
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import distributed
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.files import remove_parts, write_atomic

log = logging.getLogger("realnet")

BEST = "ckpt_best.pth.tar"
LAST, PREVIOUS, NEXT = "ckpt_last.pth.tar", "ckpt_previous.pth.tar", "ckpt_next.pth.tar"
NUMBERED = re.compile(r"ckpt_(\d+)\.pth\.tar")
DOWNLOADS = {
    "256x256_diffusion.pt": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/256x256_diffusion.pt",
    "256x256_classifier.pt": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/256x256_classifier.pt",
}


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""

    def write(part: Path) -> None:
        try:
            torch.save(content, part)
        except RuntimeError as error:
            # torch's writer says "unexpected pos" and the like where the disk is full.
            full = shutil.disk_usage(part.parent).free < 2 * part.stat().st_size + 2**20
            reason = "No space left on device" if full else str(error).splitlines()[0]
            raise RunError(f"{path}: cannot be written ({reason})") from error

    write_atomic(path, write)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Allows tensors, plain Python values and the reference's EasyDict (as a dict).

    Raises:
        UsageError: the file is missing, truncated, or needs any other pickled class.
    """
    path = Path(path)
    if not path.is_file():
        source = DOWNLOADS.get(path.name)
        fetch = f"; fetch {source} and put it there" if source else ""
        raise UsageError(f"{path} does not exist{fetch}")
    try:
        # EasyDict, the one class that the reference's files need, is read as the plain dict that it holds.
        with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises UnpicklingError, RuntimeError, EOFError and others, all meaning: not a readable checkpoint.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} is not a checkpoint that can be loaded safely: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a state_dict or a checkpoint")
    return content


# ---- weights ---------------------------------------------------------------------------------------------------------


def state_dict_of(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: its `state_dict`, or itself where it is bare; without the `module.` of DDP."""
    state = content.get("state_dict", content)
    return {name.removeprefix("module."): value for name, value in state.items() if torch.is_tensor(value)}


def load_pretrained(model: nn.Module, path: str | Path, hint: str) -> None:
    """Start a model from the tensors of a file whose names and shapes fit, and log which did and which did not.

    Args:
        path: a bare or wrapped state_dict.
        hint: the settings to check where nothing fits, for the message.

    Raises:
        UsageError: fewer than half of the network's tensors are in the file.
    """
    state = state_dict_of(load_checkpoint(path))
    own = model.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    missing = [name for name in own if name not in fitting]
    unused = [name for name in state if name not in fitting]
    if 2 * len(fitting) < len(own):
        raise UsageError(f"{path}: {len(fitting)} of {len(own)} tensors fit this network; check {hint}")
    model.load_state_dict(fitting, strict=False)
    log.info("%s: loaded %d of %d tensors", path, len(fitting), len(own))
    if missing:
        log.info("  not in the file, or of another shape (start from scratch): %s", _shortened(missing))
    if unused:
        log.info("  in the file, but not used: %s", _shortened(unused))


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path, hint: str) -> None:
    """Load trained weights, all of which must fit.

    Raises:
        UsageError: a tensor is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)]
    texts = [f"{len(names)} {problem} ({_shortened(names, 2)})" for problem, names in problems if names]
    if texts:
        raise UsageError(f"{path} does not fit this network: tensors {', '.join(texts)}; check {hint}")
    model.load_state_dict(state)


def _shortened(names: list[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# ---- numbered checkpoints --------------------------------------------------------------------------------------------


def numbered_checkpoints(folder: str | Path) -> list[Path]:
    """The `ckpt_<epoch>.pth.tar` files of a folder, oldest epoch first."""
    epochs = [(int(match[1]), path) for path in Path(folder).glob("ckpt_*") if (match := NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(epochs)]


def save_numbered(folder: str | Path, content: dict[str, Any], keep: int) -> None:
    """Write `ckpt_<epoch>.pth.tar` for the epoch that `content` names, and delete all but the newest `keep`."""
    path = Path(folder) / f"ckpt_{content['epoch']}.pth.tar"
    save_checkpoint(path, content)
    prune_checkpoints(folder, keep)
    log.info("saved %s", path)


def prune_checkpoints(folder: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` numbered checkpoints."""
    for path in numbered_checkpoints(folder)[:-keep]:
        path.unlink()


def trained_checkpoint(path: str | Path) -> Path:
    """A checkpoint by file name, or the one with the highest epoch in a folder.

    Raises:
        UsageError: neither is there.
    """
    path = Path(path)
    if path.is_dir():
        checkpoints = numbered_checkpoints(path)
        if not checkpoints:
            raise UsageError(f"{path} holds no ckpt_<epoch>.pth.tar; train the model first")
        return checkpoints[-1]
    if not path.is_file():
        raise UsageError(f"{path} does not exist; train the model first, or name its checkpoint or their folder")
    return path


# ---- resuming --------------------------------------------------------------------------------------------------------


def save_for_resume(folder: str | Path, content: dict[str, Any]) -> None:
    """Make `content` the newest checkpoint of a folder; the one before it stays until the new one is whole."""
    folder = Path(folder)
    last = folder / LAST
    save_checkpoint(folder / NEXT, content)
    if last.exists():
        last.replace(folder / PREVIOUS)
    (folder / NEXT).replace(last)


def load_for_resume(folder: str | Path, run: Run, wanted: bool) -> dict[str, Any] | None:
    """What --resume continues from, on every rank; None to start from the beginning.

    Args:
        folder: no other run may be writing to it (lock.folder_lock); what a killed run left half-written is removed.
        wanted: whether --resume was given.
    """
    content = None
    if run.is_main:
        clear_leftovers(folder)
        content = newest_readable(folder) if wanted else None
        if wanted and content is None:
            log.info("%s: nothing to resume; starting from the beginning", folder)
    # Rank 0 puts damaged files aside before the others look.
    distributed.barrier()
    return content if run.is_main or not wanted else newest_readable(folder)


def newest_readable(folder: str | Path) -> dict[str, Any] | None:
    """The newest checkpoint for resuming that can be read; None where there is none.

    A damaged one is named and renamed, so that it never takes the place of the good one before it.

    Raises:
        UsageError: there are some, and none can be read.
    """
    damaged = []
    for path in (Path(folder) / name for name in (LAST, PREVIOUS)):
        if not path.is_file():
            continue
        try:
            content = load_checkpoint(path)
        except UsageError as error:
            damaged.append((path, error))
            continue
        for broken, reason in damaged:
            log.warning("%s; %s is used instead", reason, path)
            broken.replace(broken.with_name(f"{broken.name}.damaged"))
        return content
    if damaged:
        raise damaged[0][1]
    return None


def clear_leftovers(folder: str | Path) -> None:
    """Remove what a killed run left half-written. No other run may be writing to the folder (lock.folder_lock)."""
    remove_parts(folder)
    (Path(folder) / NEXT).unlink(missing_ok=True)
