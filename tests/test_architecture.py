"""Who may import whom (docs/architecture.md), read from the sources."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
ALLOWED = {
    "preparation": {"preparation", "datasets", "utils"},
    "evaluation": {"evaluation", "datasets", "models", "utils"},
    "datasets": {"datasets", "utils"},
    "models": {"models", "utils"},
    "utils": {"utils"},
}
PACKAGES = set(ALLOWED)
LIBRARIES = {
    "torch", "torchvision", "numpy", "sklearn", "skimage", "cv2", "yaml", "easydict", "tqdm", "PIL", "jinja2",
}  # fmt: skip
# Extras, which a script may ask for and has to do without.
EXTRAS = {"export.py": {"onnx", "onnxruntime", "onnxscript"}, "evaluation/detector.py": {"onnxruntime"}}
SOURCES = [*ROOT.glob("*.py"), *(path for package in sorted(PACKAGES) for path in (ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_plan(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED.get(package, PACKAGES)
    ours = imported(path) & (PACKAGES | SCRIPTS)
    assert ours <= allowed, f"{path} imports {ours - allowed}"
    foreign = imported(path) - PACKAGES - SCRIPTS - set(sys.stdlib_module_names)
    foreign -= EXTRAS.get(path.relative_to(ROOT).as_posix(), set())
    assert foreign <= LIBRARIES, f"{path} imports {foreign - LIBRARIES}"


def test_the_commands_of_the_field_are_there():
    assert {"train_diffusion", "train_classifier", "sample", "train_realnet", "evaluation_realnet"} <= SCRIPTS
    assert len(SOURCES) > 20


def test_the_project_declares_every_command_and_package():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 or newer
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(project["py-modules"]) == SCRIPTS
    folders = {path.parent.relative_to(ROOT) for path in SOURCES if path.parent != ROOT}
    assert set(project["packages"]) == {".".join(folder.parts) for folder in folders}
