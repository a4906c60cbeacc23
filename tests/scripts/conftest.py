"""The small data set and networks trained on it, for each test file; a training of one process without its script."""

import pytest
import torch
from torch import nn

from tests.conftest import Workspace
from utils.config import load_config
from utils.distributed import Run
from utils.training import set_up_training

ALONE = Run(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Of each test file its own, so that no file meets what another one has trained."""
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def diffusion(workspace: Workspace) -> Workspace:
    workspace.run("train_diffusion.py")
    return workspace


@pytest.fixture(scope="module")
def classifier(workspace: Workspace) -> Workspace:
    workspace.run("train_classifier.py")
    return workspace


@pytest.fixture(scope="module")
def realnet(workspace: Workspace) -> Workspace:
    workspace.run("train_realnet.py", "--class_name", "all")
    return workspace


@pytest.fixture
def configured(workspace, monkeypatch):
    """configured(script, "key=value", ...): the settings of a script on the small data set."""
    monkeypatch.chdir(workspace.root)
    return lambda script, *overrides: load_config(workspace.out / f"{script}.yaml", list(overrides), script)


def training_of(config, network: nn.Module, **kwargs):
    return set_up_training(config, network, ALONE, {"arch": {}}, ("8 images", "4 images"), **kwargs)
