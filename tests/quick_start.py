"""Runs scripts as processes that begin with the libraries imported, which takes seconds otherwise: forks of a server.

The server has imported libraries, but nothing of the project, and computes nothing itself.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path

LIBRARIES = (
    "numpy", "cv2", "PIL.Image", "yaml", "easydict", "tqdm", "filelock", "jinja2", "torch", "torch.distributed",
    "torch._dynamo", "torchvision", "torch.utils.tensorboard",
)  # fmt: skip
READY, TIMED_OUT = "ready", -1000


def run(
    script: Path, arguments: Sequence[str], folder: Path, environment: dict[str, str], seconds: float
) -> subprocess.CompletedProcess:
    """As subprocess.run([sys.executable, script, *arguments], cwd=folder, capture_output=True, text=True).

    Args:
        environment: variables to set beside those that the tests began with; OMP_NUM_THREADS is 1.
    """
    if not hasattr(os, "fork"):
        command, variables = [sys.executable, str(script), *arguments], {**os.environ, **environment}
        return subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=seconds, check=False
        )
    server = _server()
    with tempfile.TemporaryDirectory() as outputs:
        task = {"argv": [str(script), *arguments], "folder": str(folder), "environment": environment}
        task |= {"outputs": outputs, "seconds": seconds}
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = [Path(outputs, name).read_text(encoding="utf-8") for name in ("out", "err")]
    if code == TIMED_OUT:
        raise subprocess.TimeoutExpired(task["argv"], seconds, *texts)
    return subprocess.CompletedProcess(task["argv"], code, *texts)


@cache
def _server() -> subprocess.Popen:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import quick_start; quick_start.serve()"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    assert server.stdout.readline().strip() == READY
    return server


def serve() -> None:
    """Fork for each task, a line of JSON on stdin, and print the exit code of the fork."""
    for name in LIBRARIES:
        importlib.import_module(name)
    print(READY, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            _begin(task)
        print(_wait(child, task["seconds"]), flush=True)


def _wait(child: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIMED_OUT


def _begin(task: dict) -> None:
    """Become the script: never returns."""
    for number, source, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{task['outputs']}/out", os.O_WRONLY | os.O_CREAT),
        (2, f"{task['outputs']}/err", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(source, flags, 0o600), number)
    os.chdir(task["folder"])
    os.environ.update(task["environment"])
    sys.argv = task["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
