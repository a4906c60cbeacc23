"""The batch verbs of run.sh; they use the environment in .venv, which `run.sh test` makes."""

import os
import re
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


@needs_environment
def test_a_class_name_is_never_run(copy):
    """Neither as a sed program, as which it once stood before each line of the log, nor as a shell command."""
    name = "x|;e touch OWNED;#$(touch OWNED)`touch OWNED`"
    done = run_sh(copy.root, "realnet", "tiny", name, code=1)
    assert f"[{name}] error: --class_name {name}" in done.stdout
    assert f"failed: {name}" in done.stderr
    assert not (copy.root / "OWNED").exists()


RECORDS = (
    '#!/bin/sh\ncase "$*" in *datasets.lists*) printf "one\\ntwo parts\\n" ;; *) printf "<%s>" "$@"; echo ;; esac\n'
)


def recording(folder: Path) -> Path:
    """run.sh beside a Python that prints its arguments."""
    shutil.copy(REPOSITORY / "run.sh", folder)
    (folder / "requirements.txt").touch()
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDS)
    python.chmod(0o755)
    wanted = subprocess.run("cat requirements*.txt | cksum", shell=True, cwd=folder, capture_output=True, check=True)
    (folder / ".venv/installed").write_bytes(wanted.stdout)
    return folder


SETS = "<--set><a.b=[*]><--set><c=2>"
LAUNCHED = "<-m><torch.distributed.run><--standalone><--nproc_per_node=2>"


@pytest.mark.parametrize(
    ("arguments", "variables", "lines"),
    [
        (["diffusion", "d"], {}, ["<train_diffusion.py><--dataset><d>"]),
        (["classifier", "d"], {"SET": "a.b=[*] c=2"}, [f"<train_classifier.py><--dataset><d>{SETS}"]),
        (["diffusion", "d"], {"GPUS": "0,1"}, [f"{LAUNCHED}<train_diffusion.py><--dataset><d>"]),
        (["evaluate", "d"], {}, ["<evaluation_realnet.py><--dataset><d><--class_name><all>"]),
        (["evaluate", "d", "a", "b c"], {}, ["<evaluation_realnet.py><--dataset><d><--class_name><a,b c>"]),
        (
            ["realnet", "d"],
            {"SET": "a.b=[*] c=2", "GPUS": "0,1"},
            [
                f"[one] <train_realnet.py><--dataset><d>{SETS}<--class_name><one>",
                f"[two parts] <train_realnet.py><--dataset><d>{SETS}<--class_name><two parts>",
            ],
        ),
        (["sample", "d", "a b"], {}, ["[a b] <sample.py><--dataset><d><--class_name><a b>"]),
    ],
)
def test_the_verbs_pass_on_what_they_are_given(arguments, variables, lines, tmp_path):
    done = run_sh(recording(tmp_path), *arguments, **variables)
    assert sorted(done.stdout.splitlines()) == lines
    assert done.stderr == ""


# ---- bash 3.2 and the tools of macOS ---------------------------------------------------------------------------------

# What bash 3.2 or macOS lacks, each with a line that has it.
LACKING = {
    r"\b(declare|local|typeset)\s+-\w*[Ang]": "declare -A table",
    r"\b(mapfile|readarray|coproc)\b": "mapfile -t lines",
    r"\$\{\w+(\[[^]]*\])?(,|\^|@\w\})": "echo ${name,,}",
    r"&>>|\|&|;;?&": "make &>> log",
    r"\bwait\s+-\w": "wait -n",
    r"\[\[\s+-[vR]\s": "[[ -v name ]]",
    r"\$\{\w+\[-\d": "echo ${list[-1]}",
    r"\$\{\w+:[^}]*:\s*-\d": "echo ${name:0:-1}",
    r"\$\{?(BASHPID|EPOCH\w+|SRANDOM)": "echo $BASHPID",
    r"%\([^)]*\)T": "printf '%(%F)T' -1",
    r"\bexec\s+\{\w+\}": "exec {file}< list",
    r"\bread\b.*\s-(t\s*0?\.|\w*[Ni])": "read -N 1 key",
    r"\bshopt\b.*(globstar|lastpipe|inherit_errexit)": "shopt -s globstar",
    r"\{\d+\.\.\d+\.\.\d+\}": "echo {0..9..2}",
    r"=\(\s*\)": "empty=()",
    r"\bsed\s+-\w*u|\bgrep\s+-\w*P|\breadlink\s+-f|\bpaste\b(?!.*\s-(\s|\)|$))": "sed -u p",
    r"\b(nproc|realpath|tac|timeout|setsid)\b|\bdate\s+-d|\bxargs\s+-\w*[dr]": "nproc",
}


@pytest.mark.parametrize("pattern", LACKING)
def test_nothing_is_used_that_bash_3_2_or_macos_lacks(pattern):
    """macOS has bash 3.2, for which no package exists here."""
    assert re.search(pattern, LACKING[pattern])
    lines = (REPOSITORY / "run.sh").read_text().splitlines()
    code = [line for line in lines if not line.lstrip().startswith("#")]
    assert [line for line in code if re.search(pattern, line)] == []


def test_no_array_is_expanded_that_may_be_empty():
    """bash before 4.4 calls an empty array unbound; each is made with an element."""
    text = (REPOSITORY / "run.sh").read_text()
    assert set(re.findall(r"\$\{[!#]?(\w+)\[[@*]\]", text)) == {"script", "gpus", "classes"}
    assert re.findall(r"\bscript=\((.*?)\)", text) == ['"train_$stage.py"', "sample.py", "evaluation_realnet.py"]
    assert "local gpus=(default)" in text
    assert 'listed=$("$PYTHON" -m datasets.lists' in text  # fails if there is no list, and set -e ends the script
