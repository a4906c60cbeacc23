"""The small data set and networks trained on it, for each test file."""

import pytest

from tests.conftest import Workspace


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
