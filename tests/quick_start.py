"""Runs scripts as processes that begin with the libraries imported, which takes seconds otherwise: forks of a server.

The server has imported libraries, but nothing of the project, and computes nothing itself. Each script has a
supervisor, also a fork, which starts its ranks and waits for them in place of torchrun.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

LIBRARIES = (
    "numpy", "cv2", "PIL.Image", "yaml", "easydict", "tqdm", "filelock", "jinja2", "torch", "torch.distributed",
    "torch._dynamo", "torchvision", "torch.utils.tensorboard", "sklearn.neighbors",
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
READY = "ready"


class Process:
    """`python COMMAND`, started; as subprocess.Popen, but its output can be read at any time.

    Args:
        command: what follows `python`: a script, `-c` or `-m`, and arguments.
        folder: where it runs.
        environment: variables to set beside those that the tests began with; OMP_NUM_THREADS is 1.
        ranks: processes that run it together, as with torchrun. nodes: machines on which they believe to be.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, environment: dict[str, str], ranks: int = 1, nodes: int = 1
    ) -> None:
        self.args = list(command)
        self.returncode: int | None = None
        self._temporary = tempfile.TemporaryDirectory()
        self._outputs = Path(self._temporary.name)
        places = _places(ranks, nodes) if ranks > 1 else [{}]
        task = {"argv": self.args, "folder": str(folder), "outputs": str(self._outputs)}
        server = _server()
        server.stdin.write(json.dumps({**task, "environments": [{**environment, **place} for place in places]}) + "\n")
        server.stdin.flush()
        self.pids: list[int] = json.loads(server.stdout.readline())
        self.pid = self.pids[0]

    def output(self) -> tuple[str, str]:
        """What it has printed so far on stdout and stderr."""
        out, err = ((self._outputs / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return out, err

    def wait_for(self, text: str, seconds: float = 90) -> None:
        """Wait until it has printed a text on stdout."""
        end = time.monotonic() + seconds
        ended = False
        while text not in self.output()[0]:
            assert not ended, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)
            ended = self.poll() is not None

    def poll(self) -> int | None:
        code = self._outputs / "code"
        if self.returncode is None and code.exists():
            self.returncode = int(code.read_text())
        return self.returncode

    def communicate(self, timeout: float = 900) -> tuple[str, str]:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
            time.sleep(0.01)
        return self.output()

    def send_signal(self, number: int) -> None:
        for pid in self.pids if self.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    seconds: float = 900,
    ranks: int = 1,
    nodes: int = 1,
) -> subprocess.CompletedProcess:
    """Run `python COMMAND` as a Process, or without forks, on Windows, as it is; as subprocess.run does."""
    if not hasattr(os, "fork"):
        command = [sys.executable, *(TORCHRUN if ranks > 1 else ()), *command]
        variables, pipes = {**os.environ, **environment}, {"capture_output": True, "text": True}
        return subprocess.run(command, cwd=folder, env=variables, timeout=seconds, check=False, **pipes)
    process = Process(command, folder, environment, ranks, nodes)
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _places(ranks: int, nodes: int) -> list[dict[str, str]]:
    """What torchrun sets in the environment of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank % (ranks // nodes))} for rank in range(ranks)]


@cache
def _server() -> subprocess.Popen:
    code = f"import sys; sys.path[0] = {str(Path(__file__).parent)!r}; import quick_start; quick_start.serve()"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    assert server.stdout.readline().strip() == READY
    return server


# ---- in the server and its forks -------------------------------------------------------------------------------------


def serve() -> None:
    """Fork a supervisor for each task, a line of JSON on stdin; it prints the pids of the task's processes."""
    for name in LIBRARIES:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    print(READY, flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            _supervise(json.loads(line))


def _supervise(task: dict) -> None:
    """Start the processes, wait for them, and write the exit code: never returns.

    As with torchrun, one that fails ends the others, and the exit code is 1.

    Args:
        task: argv, folder, outputs (a folder for what is printed and the exit code) and an environment per process.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    outputs = Path(task["outputs"])
    answer = os.dup(1)
    for number, source, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, outputs / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, outputs / "err", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(source, flags, 0o600), number)
    children = []
    for environment in task["environments"]:
        child = os.fork()
        if child == 0:
            os.close(answer)
            _begin(task["argv"], task["folder"], environment)
        children.append(child)
    os.write(answer, f"{json.dumps(children)}\n".encode())
    os.close(answer)
    code, running = 0, set(children)
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not code:
            code = os.waitstatus_to_exitcode(status) if len(children) == 1 else 1
            for other in running:
                os.kill(other, signal.SIGTERM)
    (outputs / "part").write_text(str(code))
    (outputs / "part").replace(outputs / "code")
    os._exit(0)


def _begin(argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """Become `python ARGV`: never returns."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    code = 0
    try:
        _run_main(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_main(argv: list[str]) -> None:
    if argv[0] in ("-c", "-m"):
        option, subject, *arguments = argv
        sys.argv, sys.path[0] = [option, *arguments], os.getcwd()
        if option == "-c":
            exec(subject, {"__name__": "__main__"})
        else:
            runpy.run_module(subject, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")
