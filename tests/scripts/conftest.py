"""The small data set with trained networks, one training for each test file."""

import pytest

from tests.conftest import Workspace


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
