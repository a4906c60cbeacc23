"""Errors of the machine end a command with a line, not with a traceback."""

import argparse
import errno

import pytest
import torch

from utils import cli
from utils.errors import UsageError


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "memory ran out"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
            "lower",
        ),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
            "worker (pid 12) is killed by signal",
        ),
        (RuntimeError("DataLoader worker (pid(s) 4, 5) exited unexpectedly"), "lower dataset.workers"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that"), "--shm-size"),
        (RuntimeError("unable to write to file </torch_99_1_0>: No space left on device (28)"), "/dev/shm"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "trainer.amp: bf16"),
        (OSError(errno.EROFS, "Read-only file system", "log/train.log"), "log/train.log: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "a.yaml"), "a.yaml: Permission denied"),
    ],
)
def test_the_line_says_what_to_do(error, says, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert says in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_a_programming_error_keeps_its_traceback():
    def main() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        cli.run(main)


def test_a_data_set_of_one_class_is_told_that_it_needs_no_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments/bolts").mkdir(parents=True)
    (tmp_path / "experiments/bolts/diffusion.yaml").touch()
    with pytest.raises(UsageError, match=r"bolts/classifier\.yaml does not exist; .* for several classes only"):
        cli.config_path(argparse.Namespace(config=None, dataset="bolts"), "classifier")
