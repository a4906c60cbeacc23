"""The batch verbs of run.sh; they use the environment in .venv, which `run.sh test` makes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Workspace

needs_environment = pytest.mark.skipif(
    not (REPOSITORY / ".venv/installed").is_file(), reason="no .venv; run `bash run.sh setup`"
)


def run_sh(folder: Path, *arguments: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(
        ["bash", "run.sh", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The repository's code beside the small data set, with the same environment."""
    root = tmp_path_factory.mktemp("copy")
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("requirements*.txt"), REPOSITORY / "run.sh"]:
        shutil.copy(path, root)
    for package in ("models", "datasets", "preparation", "evaluation", "utils"):
        shutil.copytree(REPOSITORY / package, root / package)
    (root / ".venv").symlink_to(REPOSITORY / ".venv")
    return Workspace(root)


def test_wrong_verbs_print_the_usage():
    for arguments in ([], ["fly"], ["diffusion"], ["realnet"], ["diffusion", "demo", "brick"]):
        done = run_sh(REPOSITORY, *arguments, code=2)
        assert "bash run.sh demo" in done.stderr


@needs_environment
def test_setup_is_idempotent(copy):
    before = (copy.root / ".venv/installed").stat().st_mtime_ns
    done = run_sh(copy.root, "setup")
    assert "installing" not in done.stdout
    assert (copy.root / ".venv/installed").stat().st_mtime_ns == before


@needs_environment
def test_a_failed_class_does_not_stop_the_rest(copy):
    settings = "trainer.max_epoch=1"
    (copy.data / "images/dots/train/good/002.png").write_bytes(b"broken")
    done = run_sh(copy.root, "realnet", "tiny", code=1, GPUS="0,1", SET=settings)
    assert "failed: dots" in done.stderr
    assert "[dots] error: data/tiny/images/dots/train/good/002.png" in done.stdout
    assert (copy.out / "realnet_checkpoints/lines/ckpt_best.pth.tar").is_file()
    done = run_sh(copy.root, "evaluate", "tiny", "lines")
    assert any(line.startswith("mean") for line in done.stdout.splitlines())
    # Classes without a checkpoint are left out and named.
    done = run_sh(copy.root, "evaluate", "tiny")
    assert "left out: experiments/tiny/realnet_checkpoints/dots/ckpt_best.pth.tar does not exist" in done.stdout
    assert (copy.out / "realnet_results/metrics.md").is_file()
