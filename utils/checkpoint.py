"""Read and write checkpoints, and find the one to resume from. Writes are atomic; reads never run pickled code."""

import logging
import re
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import distributed
from utils.config import refuse_excess
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.files import remove_parts, write_atomic
from utils.names import shown
from utils.safe_globals import SAFE_GLOBALS

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
        # To an open file, because torch names the archive inside after a path: equal runs give equal bytes.
        try:
            with open(part, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:
            # On a full disk, torch's writer only reports "unexpected pos" and the like.
            full = shutil.disk_usage(part.parent).free < 2 * part.stat().st_size + 2**20
            reason = "No space left on device" if full else str(error).splitlines()[0]
            raise RunError(f"{path}: cannot be written ({reason})") from error

    write_atomic(path, write)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Allows tensors, plain Python values, and what safe_globals.py names.

    Raises:
        UsageError: the file is missing, truncated or damaged, or needs another pickled class.
    """
    path = Path(path)
    if not path.is_file():
        source = DOWNLOADS.get(path.name)
        fetch = f"; download it from {source}" if source else ""
        raise UsageError(f"{path} does not exist{fetch}")
    _verify_checksums(path)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors and old pickles; what matters is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises UnpicklingError, RuntimeError, EOFError and others if a file is not a readable checkpoint.
        raise UsageError(f"{path} is not a checkpoint that can be loaded safely: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a state_dict or a checkpoint")
    refuse_excess({key: value for key, value in content.items() if not torch.is_tensor(value)}, path)
    for name in ("state_dict", "ema_state_dict"):
        weights = content.get(name, content if name == "state_dict" else {})
        if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
            raise UsageError(f"{path}: {name} is not a mapping from names to tensors")
    return content


def _reason(error: Exception) -> str:
    """Why torch.load failed, without its advice to switch its protection off."""
    text = str(error).strip()
    if "weights_only" in text or "Weights only" in text:
        if "Unsupported operand" in text:
            return "it is no file that torch.save writes"
        named = re.search(r"GLOBAL ([\w.]+)", text)
        what = named[1] if named else "something else"
        return f"besides tensors and plain values, it holds {what}"
    # miniz adds two sentences of its own to every reason.
    return text.splitlines()[0].split(". This is an internal miniz error")[0][:200] if text else type(error).__name__


def _verify_checksums(path: Path) -> None:
    """Check every part of a checkpoint against the checksum beside it, which torch.load does not do."""
    if not zipfile.is_zipfile(path):
        return  # Older files hold a bare pickle, without checksums; torch.load refuses what is neither.
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UsageError(f"{path} is damaged ({shown(reason)}); copy or train it again") from None
    if damaged is not None:
        raise UsageError(
            f"{path} is damaged: {shown(damaged)[:120]} does not match its checksum; copy or train it again"
        )


# ---- weights ---------------------------------------------------------------------------------------------------------


def state_dict_of(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: its `state_dict`, or all of a bare one. DDP's prefix `module.` is removed."""
    state = content.get("state_dict", content)
    return {name.removeprefix("module."): value for name, value in state.items() if torch.is_tensor(value)}


def tensor_problem(value: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why a tensor from a file cannot be a weight with this dtype; None if it can."""
    if value.layout is not torch.strided:
        return "is sparse"
    if value.is_quantized:
        return "is quantised"
    if value.device.type == "meta":
        return "has no values (meta)"
    if value.is_floating_point() and value.element_size() < 2:
        return f"holds {_type_name(value.dtype)}, which is too coarse for weights"
    if value.is_complex() or value.is_floating_point() != dtype.is_floating_point:
        return f"holds {_type_name(value.dtype)}, not {_type_name(dtype)}"
    if not dtype.is_floating_point and value.dtype != dtype:
        return f"holds {_type_name(value.dtype)}, not {_type_name(dtype)}"
    return None


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_pretrained(model: nn.Module, path: str | Path, hint: str) -> None:
    """Load the tensors of a file whose names and shapes match the model, and log which do and which do not.

    Args:
        path: a bare or wrapped state_dict.
        hint: the settings that the error message says to check.

    Raises:
        UsageError: fewer than half of the network's tensors are in the file.
    """
    state = state_dict_of(load_checkpoint(path))
    own = model.state_dict()
    fitting = {
        name: value
        for name, value in state.items()
        if name in own and value.shape == own[name].shape and not tensor_problem(value, own[name].dtype)
    }
    missing = [name for name in own if name not in fitting]
    unused = [name for name in state if name not in fitting]
    if 2 * len(fitting) < len(own):
        raise UsageError(f"{path}: {len(fitting)} of {len(own)} tensors fit this network; check {hint}")
    model.load_state_dict(fitting, strict=False)
    log.info("%s: loaded %d of %d tensors", path, len(fitting), len(own))
    if missing:
        log.info("  not in the file or of another shape, so trained from scratch: %s", _shortened(missing))
    if unused:
        log.info("  in the file but not used: %s", _shortened(unused))


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path, hint: str) -> None:
    """Load trained weights, all of which must fit.

    Raises:
        UsageError: a tensor is missing, unexpected, of another shape or of another kind, e.g. sparse.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    kinds = {name: tensor_problem(state[name], own[name].dtype) for name in own if name in state}
    odd = [f"{name} {problem}" for name, problem in kinds.items() if problem]
    problems = [
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", reshaped),
        ("of another kind", odd),
    ]
    texts = [f"{len(names)} {problem} ({_shortened(names, 2)})" for problem, names in problems if names]
    if texts:
        raise UsageError(f"{path} does not fit this network: tensors {', '.join(texts)}; check {hint}")
    model.load_state_dict(state)


def has_finite_weights(network: nn.Module) -> bool:
    """Whether all weights and statistics of a network are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())


def _shortened(names: list[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# ---- numbered checkpoints --------------------------------------------------------------------------------------------


def numbered_checkpoints(folder: str | Path) -> list[Path]:
    """The `ckpt_<epoch>.pth.tar` files of a folder, oldest epoch first."""
    epochs = [(int(match[1]), path) for path in Path(folder).glob("ckpt_*") if (match := NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(epochs)]


def save_numbered(folder: str | Path, content: dict[str, Any], keep: int) -> None:
    """Write `ckpt_<epoch>.pth.tar`, with the epoch in `content`, and delete all but the newest `keep`."""
    path = Path(folder) / f"ckpt_{content['epoch']}.pth.tar"
    save_checkpoint(path, content)
    prune_checkpoints(folder, keep, path)
    log.info("saved %s", path)


def prune_checkpoints(folder: str | Path, keep: int, written: Path | None = None) -> None:
    """Delete all but the newest `keep` numbered checkpoints."""
    for path in numbered_checkpoints(folder)[:-keep]:
        if path != written:
            path.unlink()


def trained_checkpoint(path: str | Path) -> Path:
    """The path itself if it is a file; for a folder, the path of its checkpoint with the highest epoch.

    Raises:
        UsageError: the path does not exist, or the folder holds no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        checkpoints = numbered_checkpoints(path)
        if not checkpoints:
            raise UsageError(f"{path} holds no ckpt_<epoch>.pth.tar; train the model first")
        return checkpoints[-1]
    if not path.is_file():
        raise UsageError(f"{path} does not exist; train the model first, or give the path of its checkpoint or folder")
    return path


# ---- resuming --------------------------------------------------------------------------------------------------------


def save_for_resume(folder: str | Path, content: dict[str, Any]) -> None:
    """Write `content` as ckpt_last and keep the one before as ckpt_previous; a crash leaves a complete one."""
    folder = Path(folder)
    save_checkpoint(folder / NEXT, content)
    _move_into_place(folder)


def _move_into_place(folder: Path) -> None:
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / PREVIOUS)
    (folder / NEXT).replace(folder / LAST)


def refuse_earlier_run(folder: str | Path, resume: bool, overwrite: bool) -> None:
    """Refuse to train in a folder with an earlier run, unless --resume or --overwrite says what to do with it.

    Raises:
        UsageError: neither does, or (resume) the earlier run has left no checkpoint that a run can resume from.
    """
    earlier = files_of_run(folder)
    if not earlier or overwrite:
        return
    if not resume:
        raise UsageError(
            f"{folder} holds the checkpoints of an earlier run ({earlier[0].name}): --resume continues that run, "
            "--overwrite deletes its checkpoints and starts anew"
        )
    if not any((Path(folder) / name).is_file() for name in (NEXT, LAST, PREVIOUS)):
        raise UsageError(f"{folder} holds no {LAST} to resume; --overwrite deletes its files and starts anew")


def load_for_resume(folder: str | Path, run: Run, resume: bool) -> dict[str, Any] | None:
    """The checkpoint that --resume continues from, on every rank; None means to start from the beginning.

    Args:
        folder: of the checkpoints, which refuse_earlier_run has accepted. Half-written files are removed, so no other
            run may write there (lock.folder_lock).
        resume: whether --resume was given.

    Raises:
        UsageError: there are checkpoints, but none can be read.
    """
    content, path = None, None
    if run.is_main:
        remove_parts(folder)
        if not zipfile.is_zipfile(Path(folder) / NEXT):
            (Path(folder) / NEXT).unlink(missing_ok=True)
        found = newest_readable(folder) if resume else None
        if resume and found is None:
            log.info("%s: nothing to resume; starting from the beginning", folder)
        path, content = found or (None, None)
    # Rank 0 chooses, and renames damaged files, before the other ranks read.
    path, checksums = distributed.broadcast((path, _checksums(path) if path else None))
    if path is None:
        return None
    seen = distributed.gather(path.is_file() and _checksums(path) == checksums)
    if not distributed.broadcast(seen is not None and all(seen)):
        raise UsageError(
            f"{path}: rank 0 resumes it, but other ranks do not see this file; share the folder among hosts"
        )
    return content if run.is_main else load_checkpoint(path)


def _checksums(path: Path) -> list[tuple[str, int]] | None:
    """The checksums of a checkpoint's parts, as the file itself lists them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [(info.filename, info.CRC) for info in archive.infolist()]
    except (zipfile.BadZipFile, OSError):
        return None


def clear_earlier_run(folder: str | Path, run: Run) -> None:
    """Delete the checkpoints of an earlier run, as --overwrite asks for; last thing before the new run trains."""
    if run.is_main:
        for path in files_of_run(folder):
            path.unlink()


def files_of_run(folder: str | Path) -> list[Path]:
    """The checkpoints of a training, with damaged ones and the thresholds that belong to them; no half-written one."""
    patterns = ("ckpt_*.pth.tar", "ckpt_*.damaged", "ckpt_*.thresholds.json")
    found = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
    return [path for path in found if path.name != NEXT or zipfile.is_zipfile(path)]


def newest_readable(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint to resume from, and its path; None if the folder has none.

    A damaged checkpoint is logged and renamed: otherwise, the next save would move it over the good one before it. What
    a killed run had saved but not yet moved into its place is moved there.

    Raises:
        UsageError: there are checkpoints, but none can be read.
    """
    damaged = []
    folder = Path(folder)
    for path in (folder / name for name in (NEXT, LAST, PREVIOUS)):
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
        if path.name == NEXT:
            _move_into_place(folder)
            path = folder / LAST
        return path, content
    if damaged:
        raise damaged[0][1]
    return None
