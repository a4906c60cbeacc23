"""Arguments are parsed before PyTorch is loaded, and what goes wrong until then is said in a line."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))
ANSWER = """
import runpy, sys
for script, option in zip(sys.argv[1].split(","), sys.argv[2].split(",")):
    sys.argv = [script, option]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(script, end.code)
slow = {"torch", "torchvision", "cv2", "sklearn", "numpy"} & set(sys.modules)
print("loaded", sorted(slow))
"""
INTERRUPTED = """
import runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise {error}
sys.meta_path.insert(0, Finder())
sys.argv = ["train_realnet.py"]
runpy.run_path("train_realnet.py", run_name="__main__")
"""


def python(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)


def test_help_and_wrong_options_are_answered_before_pytorch_is_loaded():
    assert "train_realnet.py" in SCRIPTS
    done = python(ANSWER, ",".join(SCRIPTS * 2), ",".join(["--help"] * len(SCRIPTS) + ["--wrong"] * len(SCRIPTS)))
    lines = done.stdout.splitlines()
    for script in SCRIPTS:
        assert [f"{script} {code}" in lines for code in (0, 2)] == [True, True], done.stderr
    assert lines[-1] == "loaded []"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        ("KeyboardInterrupt", 130, ""),
        ("ModuleNotFoundError('No module named torch', name='torch')", 1, "error: the Python library torch is not"),
        ("ValueError('a fault')", 1, "Traceback"),
    ],
)
def test_what_ends_a_script_while_it_starts(error, code, says):
    done = python(INTERRUPTED.replace("{error}", error))
    assert done.returncode == code
    assert done.stderr.startswith(says)
    assert says or not done.stderr
