"""Trained networks of SDAS: their settings come from their checkpoints, their weights are the averaged ones."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from easydict import EasyDict

from utils.checkpoint import load_checkpoint, load_weights, state_dict_of, trained_checkpoint
from utils.config import checked, plain, pretrained_path
from utils.counts import counted
from utils.errors import UsageError
from utils.names import name_problem
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
        settings = network_settings(content, section)
        for key, value in settings.items():
            default, given = SETTINGS["sample"].keys[section].keys[key].default, plain(config[section][key])
            if given not in (value, default):
                log.info("uses the checkpoint's %s.%s: %s (in the YAML: %s)", section, key, value, given)
        config[section].update(settings)
        if config[section].class_number is None:
            raise UsageError(f"{section}.class_number is missing, and {checkpoint} does not hold it")
        networks[section] = checkpoint, content
    _use_process_of(networks["unet"][1], config)
    # The values from checkpoints are not to be trusted more than those of a YAML.
    checked(plain(config), networks["unet"][0], "sample")
    return networks


def _use_process_of(content: dict, config: EasyDict) -> None:
    """Sample by the process, and by default at the image size, that the diffusion model was trained with."""
    own = content.get("process")
    trained = own if isinstance(own, dict) else _reference_section(content, "TrainSampler")
    for key in ("T", "beta_scheduler", "rescale_timesteps"):
        value = trained.get(key)
        if value is not None and value != config.TestSampler[key]:
            given = config.TestSampler[key]
            log.info("uses the checkpoint's TestSampler.%s: %s (in the YAML: %s)", key, value, given)
            config.TestSampler[key] = value
    sizes = content.get("input_size"), _reference_section(content, "dataset").get("input_size")
    size = next((list(size) for size in sizes if isinstance(size, (list, tuple)) and len(size) == 2), [None, None])
    for key, side in zip(("H", "W"), size, strict=True):
        if config.dataset[key] is None and side is None:
            raise UsageError(f"dataset.{key} is missing, and the checkpoint does not hold the size of its images")
        config.dataset[key] = config.dataset[key] or side
    drawn = [config.dataset.H, config.dataset.W]
    if size not in (drawn, [None, None]):
        text = "warning: the model was trained on images of %s (height, width), and draws %s; see dataset.H, dataset.W"
        log.warning(text, size, drawn)


def network_settings(content: dict, section: str) -> dict:
    """The settings of the network in a checkpoint of ours, or of the reference program, which stores all settings."""
    arch = content.get("arch")
    arch = arch.get(section, arch) if isinstance(arch, dict) else {}
    known = set(SETTINGS["sample"].keys[section].keys) - {"pertrain_path", "pretrain_path"}
    return {key: plain(value) for key, value in arch.items() if key in known}


def class_names_of(content: dict) -> list[str]:
    """The classes in a checkpoint, in the order of their numbers; empty if it does not name them."""
    lists = content.get("classes"), _reference_section(content, "dataset").get("class_name_list")
    names = next((names for names in lists if isinstance(names, (list, tuple)) and names), [])
    return [str(name) for name in names]


def class_list(config: EasyDict, networks: dict[str, tuple[Path, dict]], known: Sequence[str] = ()) -> list[str]:
    """The classes in the order of their numbers: from the checkpoint, the settings, or those of a known data set.

    Args:
        config: the settings of sample.yaml.
        networks: see load_networks.
        known: the classes of the data set, if it is one of the catalogue's.

    Raises:
        UsageError: the classes are unknown, a name cannot be that of a folder, or the classifier was trained on other
            classes and would guide wrongly.
    """
    path, content = networks["unet"]
    classes = class_names_of(content) or [str(name) for name in config.classes or []]
    for name in classes:
        problem = name_problem(name) or ("is there twice" if classes.count(name) > 1 else None)
        if problem:
            raise UsageError(f"{path}: the class {name[:80]!r} {problem}; it cannot be the name of a folder")
    if "classifier" in networks:
        check_same_classes(config, networks, classes)
    if classes:
        return classes
    if not known or len(known) != config.unet.class_number:
        raise UsageError(f"{path} does not name its classes; list them in their order under `classes` in sample.yaml")
    return list(known)


def check_same_classes(config: EasyDict, networks: dict[str, tuple[Path, dict]], classes: list[str]) -> None:
    """Refuse a classifier whose class numbers mean other classes than those of the diffusion model."""
    (path, _), (classifier_path, content) = networks["unet"], networks["classifier"]
    hint = "train both on the same image list, or pass --no-classifier"
    others = class_names_of(content)
    if classes and not others:
        log.warning("warning: %s does not name its classes; they have to be %s", classifier_path, ", ".join(classes))
    if classes and others and others != classes:
        lists = f"the classes {', '.join(others)}, and {path} on {', '.join(classes)}"
        raise UsageError(f"{classifier_path} was trained on {lists}; {hint}")
    numbers = config.classifier.class_number, config.unet.class_number
    if numbers[0] != numbers[1]:
        raise UsageError(f"{classifier_path} knows {counted(numbers[0], 'class')}, and {path} {numbers[1]}; {hint}")


def _reference_section(content: dict, name: str) -> dict:
    """A section of the settings that the reference program stores as `arch`, where ours store the network's only."""
    settings = content.get("arch")
    section = settings.get(name) if isinstance(settings, dict) else None
    return section if isinstance(section, dict) else {}


def load_averaged(network: torch.nn.Module, path: Path, content: dict, hint: str) -> None:
    """Load the averaged weights of a checkpoint, or its only ones."""
    averaged = "ema_state_dict" in content
    state = state_dict_of({"state_dict": content["ema_state_dict"]} if averaged else content)
    load_weights(network, state, path, hint)
    log.info("%s: epoch %s%s", path, content.get("epoch", "?"), ", averaged weights" if averaged else "")
