"""The pages in docs/ and the examples in docstrings."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from utils.setting_types import Setting, constraint, rows, settings_page
from utils.settings import SETTINGS

KEYS = [(f"{file}.{key}", setting) for file, section in SETTINGS.items() for key, setting in rows(section)]
PUBLIC = [
    "datasets.anomaly", "datasets.foreground", "datasets.given_images", "datasets.good_images", "datasets.images",
    "datasets.lists", "datasets.loaders", "datasets.local_anomalies", "datasets.pair_formats", "datasets.pairs",
    "datasets.perlin",
    "evaluation.inputs",
    "evaluation.metrics", "evaluation.normal_scores", "evaluation.plots", "evaluation.thresholds", "evaluation.tiling",
    "models.afs", "models.backbones", "models.losses", "models.realnet", "models.recon", "models.rrs",
    "models.sdas.diffusion", "models.sdas.unet", "models.structures", "models.subspace",
    "preparation.settings_files", "utils.optim", "utils.pictures",
]  # fmt: skip
PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(REPOSITORY.glob("docs/*.md")),
    *(REPOSITORY / folder / "README.md" for folder in ("data", "examples", "experiments", "pretrain")),
]


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


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_pages_name_existing_files(path: Path):
    """Links between the pages, their headings, and the modules that they name lead to something."""
    text = path.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if not target.startswith("http"):
            page = path.parent / target if target else path
            assert page.exists(), f"{path}: {target} does not exist"
            assert not heading or heading in headings(page), f"{path}: {target} has no heading {heading}"
    for module in re.findall(r"`((?:datasets|evaluation|models|preparation|utils|tests)/[\w/]+\.py)`", text):
        assert (REPOSITORY / module).is_file(), f"{path}: {module} does not exist"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_in_pages_are_shown_as_code(path: Path):
    """A command that begins a line of a paragraph would be shown as prose."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^(?:python|torchrun|bash|pip) .*", text, re.MULTILINE)
    assert not lines


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_placeholders_in_pages_are_shown(path: Path):
    """<class> outside of code is taken for a tag, and not shown."""
    text = re.sub(
        r"^```.*?^```$|^    .*?$|`[^`]+`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    assert not re.findall(r"<[a-zA-Z]\w*>", text)


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    names = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name).lower().replace(" ", "-") for name in names}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_in_pages_are_those_of_the_scripts(path: Path):
    """Scripts that code blocks run exist, and have the options that stand there."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    shared = (REPOSITORY / "utils/arguments.py").read_text(encoding="utf-8")
    for script, given in re.findall(r"(?:python|torchrun[^\n]*?|exec python) ([\w/]+\.py)([^\n#`'|]*)", text):
        assert (REPOSITORY / script).is_file(), f"{path}: {script} does not exist"
        source = (REPOSITORY / script).read_text(encoding="utf-8") + shared
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", given):
            known = f'"{option}"' in source or option == "--quick"
            assert known, f"{path}: {script} has no option {option}"


def test_the_citation_file_is_that_of_the_paper():
    content = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    # What version 1.2.0 of the format requires, of the file and of a reference.
    assert {"cff-version", "message", "title", "authors"} <= content.keys()
    assert content["cff-version"] == "1.2.0"
    assert "independent re-implementation" in content["message"]
    paper = content["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["type"] == "conference-paper"
    assert [author["family-names"] for author in paper["authors"]] == ["Zhang", "Xu", "Zhou"]
    assert paper["year"] == 2024
