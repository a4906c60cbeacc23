"""The pages in docs/ and the examples in docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from utils.setting_types import Setting, constraint, rows, settings_page
from utils.settings import SETTINGS

KEYS = [(f"{file}.{key}", setting) for file, section in SETTINGS.items() for key, setting in rows(section)]
PUBLIC = [
    "datasets.anomaly", "datasets.foreground", "datasets.images", "datasets.lists", "datasets.loaders",
    "datasets.local_anomalies", "datasets.good_images", "datasets.pair_formats", "datasets.perlin",
    "evaluation.metrics", "evaluation.normal_scores", "evaluation.thresholds", "evaluation.tiling",
    "models.afs", "models.backbones", "models.losses", "models.realnet", "models.recon", "models.rrs",
    "models.sdas.diffusion", "models.sdas.unet", "models.structures", "models.subspace", "utils.optim",
]  # fmt: skip


@pytest.mark.parametrize(("key", "setting"), KEYS, ids=[key for key, _ in KEYS])
def test_every_setting_has_a_help_text(key: str, setting: Setting):
    assert len(setting.help) > 10, f"{key} has no help"
    assert setting.help.endswith("."), f"{key}: its help is not a sentence"
    assert constraint(setting)


def test_the_settings_page_is_up_to_date():
    page = (REPOSITORY / "docs/settings.md").read_text(encoding="utf-8")
    assert page == settings_page(SETTINGS), "run python -m utils.settings > docs/settings.md"


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings_hold(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0, f"{name} has no example"
    assert result.failed == 0


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("docs/*.md")), ids=lambda path: path.name)
def test_pages_name_existing_files(path: Path):
    """Links between the pages, and the modules that they name, lead to files."""
    import re

    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path}: {target} does not exist"
    for module in re.findall(r"`((?:datasets|evaluation|models|preparation|utils|tests)/[\w/]+\.py)`", text):
        assert (REPOSITORY / module).is_file(), f"{path}: {module} does not exist"
