"""Which package may import which (docs/architecture.md), checked in the sources."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
ALLOWED = {
    "preparation": {"preparation", "datasets", "models", "utils"},
    "evaluation": {"evaluation", "datasets", "models", "utils"},
    "datasets": {"datasets", "utils"},
    "models": {"models", "utils"},
    "utils": {"utils"},
}
PACKAGES = set(ALLOWED)
LIBRARIES = {
    "torch", "torchvision", "numpy", "sklearn", "skimage", "cv2", "yaml", "easydict", "tqdm", "PIL", "jinja2",
    "filelock",
}  # fmt: skip
# Optional libraries: a script may import them, but must run without them.
EXTRAS = {
    "export.py": {"onnx", "onnxruntime", "onnxscript"},
    "evaluation/exported_onnx.py": {"onnxruntime"},
    "models/timm_backbones.py": {"timm", "safetensors", "huggingface_hub"},
}
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
    from_project = imported(path) & (PACKAGES | SCRIPTS)
    assert from_project <= allowed, f"{path} imports {from_project - allowed}"
    libraries = imported(path) - PACKAGES - SCRIPTS - set(sys.stdlib_module_names)
    libraries -= EXTRAS.get(path.relative_to(ROOT).as_posix(), set())
    assert libraries <= LIBRARIES, f"{path} imports {libraries - LIBRARIES}"


def test_the_commands_of_the_reference_exist():
    assert {"train_diffusion", "train_classifier", "sample", "train_realnet", "evaluation_realnet"} <= SCRIPTS
    assert len(SOURCES) > 20


def test_the_project_declares_every_command_and_package():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 or newer
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(project["py-modules"]) == SCRIPTS
    folders = {path.parent.relative_to(ROOT) for path in SOURCES if path.parent != ROOT}
    assert set(project["packages"]) == {".".join(folder.parts) for folder in folders}
