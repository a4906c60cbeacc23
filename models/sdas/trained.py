"""Trained networks of SDAS: their settings come from their checkpoints, their weights are the averaged ones."""

import logging
from pathlib import Path

import torch
from easydict import EasyDict

from utils.checkpoint import load_checkpoint, load_weights, state_dict_of, trained_checkpoint
from utils.config import plain, pretrained_path
from utils.errors import UsageError
from utils.settings import SETTINGS

log = logging.getLogger("realnet")


def load_networks(config: EasyDict) -> dict[str, tuple[Path, dict]]:
    """The checkpoints of unet and (with guidance) classifier: (path, content) by section.

    The network settings in a checkpoint replace those of its section in the YAML.
    """
    networks = {}
    for section in ("unet", "classifier"):
        if config[section] is None:
            continue
        path = pretrained_path(config[section])
        if path is None:
            raise UsageError(f"{section}.pertrain_path is not set: name the trained checkpoint or its folder")
        checkpoint = trained_checkpoint(path)
        content = load_checkpoint(checkpoint)
        config[section].update(network_settings(content, section))
        if config[section].class_number is None:
            raise UsageError(f"{section}.class_number is missing, and {checkpoint} does not hold it")
        networks[section] = checkpoint, content
    return networks


def network_settings(content: dict, section: str) -> dict:
    """The settings of the network in a checkpoint of ours, or of the reference program, which stores all settings."""
    arch = content.get("arch")
    arch = arch.get(section, arch) if isinstance(arch, dict) else {}
    known = set(SETTINGS["sample"].keys[section].keys) - {"pertrain_path", "pretrain_path"}
    return {key: plain(value) for key, value in arch.items() if key in known}


def load_averaged(network: torch.nn.Module, path: Path, content: dict, hint: str) -> None:
    """Load the averaged weights of a checkpoint, or its only ones."""
    averaged = "ema_state_dict" in content
    state = state_dict_of({"state_dict": content["ema_state_dict"]} if averaged else content)
    load_weights(network, state, path, hint)
    log.info("%s: epoch %s%s", path, content.get("epoch", "?"), ", averaged weights" if averaged else "")
