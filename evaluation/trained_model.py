"""A trained RealNet with the settings that belong to it, and the fingerprint by which thresholds know it again."""

import copy
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict

from datasets.build import preprocessing_of
from evaluation.normal_scores import TARGET_FPR, NormalScores
from evaluation.score import pooling_window
from evaluation.thresholds import Thresholds, matching_thresholds, of_normals
from models.realnet import MEASURED, RealNet, build_realnet, check_realnet
from utils.checkpoint import load_checkpoint, load_weights, state_dict_of
from utils.config import checked, collect_errors, differences, plain, shortened
from utils.counts import counted
from utils.errors import UsageError
from utils.precision import FP32, precision_in

log = logging.getLogger("realnet")

# What decides how a detector sees an image; a YAML that says otherwise is overruled by the checkpoint.
MODEL_SETTINGS = (
    "structure",
    "net",
    "dataset.input_size",
    "dataset.pixel_mean",
    "dataset.pixel_std",
    "dataset.image_reader.kwargs.color_mode",
    "dataset.image_reader.kwargs.bits",
    "evaluator.metrics",
    "evaluator.score",
)


@dataclass(frozen=True)
class HeldOut:
    """Good images that a model was not trained on, and what it gave on them, as its checkpoint holds them.

    Args:
        files: their names in the image list, by class.
        normal: their scores, by class.
        low, high: range of heat maps, from these images and synthetic anomalies on them.
        precision: of the forward passes that gave the scores.
        parts: the part that an image shows, by file name, as far as dataset.train.parts names it.
    """

    files: dict[str, list[str]]
    normal: dict[str, NormalScores]
    low: float
    high: float
    precision: str = FP32
    parts: dict[str, str] = field(default_factory=dict)

    def parts_of(self, name: str) -> list[str]:
        """The part that each image of a class shows, in the order of the files; the file name if it is not known."""
        return [self.parts.get(file, file) for file in self.files[name]]

    def as_content(self) -> dict[str, Any]:
        """Plain values, for the checkpoint's key `held_out`."""
        normal = {name: scores.as_content() for name, scores in self.normal.items()}
        values = {"low": self.low, "high": self.high, "precision": self.precision, "parts": self.parts}
        return {"files": self.files, "normal": normal, **values}

    @classmethod
    def from_content(cls, content: Any, path: Path) -> "HeldOut":
        """The opposite of as_content.

        Raises:
            UsageError: the file at `path` holds something else.
        """
        try:
            normal = {str(name): NormalScores.from_content(part, str(path)) for name, part in content["normal"].items()}
            files = {str(name): [str(file) for file in names] for name, names in content["files"].items()}
            parts = {str(file): str(part) for file, part in content.get("parts", {}).items()}
            low, high = float(content["low"]), float(content["high"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UsageError(f"{path}: held_out is {shortened(content)}, not what train_realnet.py writes") from None
        if not normal or not 0 <= low <= high <= 1:
            raise UsageError(f"{path}: held_out holds no class, or no range of heat maps in 0 .. 1; train again")
        return cls(files, normal, low, high, precision_in(content, str(path)), parts)


@dataclass(frozen=True)
class TrainedModel:
    """A network in eval mode, on the CPU.

    Args:
        network: the network.
        config: settings of realnet.yaml: those in the checkpoint, if it holds some.
        fingerprint: see fingerprint_of.
        epoch: after which it was saved, or "?".
        held_out: scores of held-out good images; None if there are none.
        trained_on: names of its training images in their list; empty if the checkpoint does not say.
    """

    network: RealNet
    config: EasyDict
    fingerprint: str
    epoch: int | str
    held_out: HeldOut | None = field(default=None, compare=False)
    trained_on: frozenset[str] = frozenset()

    def known(self, files: Iterable[str]) -> str:
        """What the figures on these images are flattered by: those that training has seen; "" if it saw none."""
        files = set(files)
        held_out = {file for names in self.held_out.files.values() for file in names} if self.held_out else set()
        counts = ((len(files & self.trained_on), "trained on"), (len(files & held_out), "held out for the threshold"))
        of = f"of the {counted(len(files), 'test image')}"
        seen = " and ".join(counted(n, f"{of} was {how}", f"{of} were {how}") for n, how in counts if n)
        return f"flattered: {seen}; train again, or test on other images" if seen else ""

    def thresholds(self, path: Path, target_fpr: float = TARGET_FPR) -> Thresholds | None:
        """The thresholds in the file beside the model at `path`, else those that held-out good images give, if any."""
        beside, own = matching_thresholds(path, self.fingerprint), self.own_thresholds(target_fpr)
        if beside is None or own is None:
            return own if beside is None else beside
        return beside.knowing(own)

    def own_thresholds(self, target_fpr: float = TARGET_FPR) -> Thresholds | None:
        """The thresholds that held-out good images give; None if there are none."""
        if self.held_out is None:
            return None
        held_out = self.held_out
        thresholds = of_normals(held_out.normal, target_fpr, held_out.low, held_out.high, self.fingerprint)
        return thresholds.measured_in(held_out.precision)


def load_trained(path: Path, fallback: EasyDict | None = None, fallback_path: str | Path | None = None) -> TrainedModel:
    """Load a checkpoint of train_realnet.py or of the reference program.

    Args:
        fallback: settings for checkpoints that hold none. The reference's hold their networks, which then apply.
        fallback_path: where the fallback was read, for messages.

    Raises:
        UsageError: the file is not a checkpoint, does not fit its settings, or has none.
    """
    content = load_checkpoint(path)
    own = isinstance(content.get("config"), dict)
    if own:
        config = checked(content["config"], path, "realnet")
        if fallback is not None and fallback_path is not None and overruled_settings(config, fallback):
            log.info("%s holds its settings, which are used instead of those of %s", path, fallback_path)
    elif fallback is not None:
        config = _with_networks_of(content, fallback, path)
    else:
        raise UsageError(f"{path} holds no settings; pass the realnet.yaml that it was trained with as --config")
    where = path if own else fallback_path or path
    # A checkpoint to resume from may hold the averaged weights beside those in training.
    weights = state_dict_of({"state_dict": content["ema_state_dict"]} if "ema_state_dict" in content else content)
    trained = trained_from(weights, config, path, where, content.get("epoch", "?"))
    held_out = HeldOut.from_content(content["held_out"], path) if "held_out" in content else None
    return replace(trained, held_out=held_out, trained_on=_names_in(content, path))


def joined_names(names: Iterable[str]) -> str:
    """File names as one text, for the checkpoint's key `trained_on`; a hundred thousand values would be too many."""
    return "\0".join(names)


def _names_in(content: dict[str, Any], path: Path) -> frozenset[str]:
    """The opposite of joined_names; no names if the checkpoint does not say."""
    text = content.get("trained_on", "")
    if not isinstance(text, str):
        raise UsageError(f"{path}: trained_on is {shortened(text)}, not file names; train again")
    return frozenset(text.split("\0")) - {""}


def trained_from(
    state: dict[str, torch.Tensor], config: EasyDict, path: Path, where: str | Path, epoch: int | str = "?"
) -> TrainedModel:
    """The model with these weights and settings.

    Args:
        path, where: of the files that hold the weights and the settings, for messages.

    Raises:
        UsageError: the settings describe no network, or the weights do not fit it.
    """
    collect_errors(where, [("structure, net", lambda: check_realnet(config))])
    network = build_realnet(config, "checkpoint")
    load_weights(network, state, path, "structure and net in the settings")
    network = network.requires_grad_(False).eval()
    return TrainedModel(network, config, fingerprint_of(network, config), epoch)


def _with_networks_of(content: dict[str, Any], fallback: EasyDict, path: Path) -> EasyDict:
    """The fallback with the networks of a reference checkpoint, whose `arch` lists them with AFS's structure."""
    arch = plain(content.get("arch"))
    if not isinstance(arch, list) or not all(isinstance(part, dict) and "name" in part for part in arch):
        return fallback
    config = copy.deepcopy(fallback)
    config.net = arch
    kwargs = next((part.get("kwargs") for part in arch if part["name"] == "afs"), None)
    structure = kwargs.get("structure") if isinstance(kwargs, dict) else None
    if structure:
        config.structure = structure
    return checked(plain(config), path, "realnet")


def fingerprint_of(network: torch.nn.Module, config: EasyDict) -> str:
    """A hash of the weights and of the preprocessing: thresholds hold for scores of exactly this model."""
    preprocessing = preprocessing_of(config.dataset)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([*vars(preprocessing).values(), *pooling_window(config.evaluator)]).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().reshape(-1).view("uint8"))
    return digest.hexdigest()


def overruled_settings(trained: EasyDict, given: EasyDict) -> list[str]:
    """The settings of a YAML that the checkpoint overrules, as "key: used (in the YAML: given)"."""
    found = []
    for key in MODEL_SETTINGS:
        other, used = (_given_values(_at(config, key)) for config in (given, trained))
        found += differences(other, used, key)
    return [f"{key}: {used} (in the YAML: {other})" for key, other, used in found]


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _given_values(value: Any) -> Any:
    """The values that a user gives, without those that the reference program measures and stores beside them."""
    if isinstance(value, dict):
        return {key: _given_values(entry) for key, entry in value.items() if key not in MEASURED}
    return [_given_values(entry) for entry in value] if isinstance(value, (list, tuple)) else value
