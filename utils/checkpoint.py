"""Reading and writing checkpoints: whole or not at all, and never any pickled code."""

import logging
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.errors import RunError, UsageError

log = logging.getLogger("realnet")

CHECKPOINT_NAME = re.compile(r"ckpt_(\d+)\.pth\.tar")
DOWNLOADS = {
    "256x256_diffusion.pt": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/256x256_diffusion.pt",
    "256x256_classifier.pt": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/256x256_classifier.pt",
}


def write_atomic(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: `path` is never half-written."""
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-", suffix=path.suffix)
        os.close(handle)
        part = Path(name)
        write(part)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; give what a plain open() would have given.
        part.chmod(0o666 & ~umask())
        part.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def umask() -> int:
    """The bits that new files lack; reading them takes setting them."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


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
        # torch raises UnpicklingError, RuntimeError, EOFError and others for what all means: not a readable checkpoint.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} is not a checkpoint that can be loaded safely: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a state_dict or a checkpoint")
    return content


def state_dict_of(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: its `state_dict`, or itself where it is bare; without the `module.` of DDP."""
    state = content.get("state_dict", content)
    return {name.removeprefix("module."): value for name, value in state.items() if torch.is_tensor(value)}


def load_pretrained(model: nn.Module, path: str | Path, hint: str) -> None:
    """Start a model from the tensors of a file whose names and shapes fit, and log what did and did not.

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
        UsageError: a tensor is missing, surplus or of another shape.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    surplus = [name for name in state if name not in own]
    unlike = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [("missing", missing), ("unexpected", surplus), ("of another shape", unlike)]
    found = [f"{len(names)} {what} ({_shortened(names, 2)})" for what, names in problems if names]
    if found:
        raise UsageError(f"{path} does not fit this network: tensors {', '.join(found)}; check {hint}")
    model.load_state_dict(state)


def _shortened(names: list[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def numbered_checkpoints(folder: str | Path) -> list[Path]:
    """The `ckpt_<epoch>.pth.tar` files of a folder, oldest epoch first."""
    found = [
        (int(match[1]), path) for path in Path(folder).glob("ckpt_*") if (match := CHECKPOINT_NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the highest epoch, or None."""
    found = numbered_checkpoints(folder)
    return found[-1] if found else None


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
    """A checkpoint by file name, or the newest one of a folder.

    Raises:
        UsageError: neither is there.
    """
    path = Path(path)
    if path.is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UsageError(f"{path} holds no ckpt_<epoch>.pth.tar; train the model first")
        return newest
    if not path.is_file():
        raise UsageError(f"{path} does not exist; train the model first, or name its checkpoint or their folder")
    return path
