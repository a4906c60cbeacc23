"""What the environment says about ranks, and what is wrong with it in one line."""

import os
import socket
from datetime import timedelta

import pytest

from tests import quick_start
from tests.conftest import REPOSITORY
from utils import distributed
from utils.errors import RunError, UsageError
from utils.launcher import launched_ranks

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    def set_variables(**variables: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_ranks_of_a_launcher(environment):
    environment()
    assert launched_ranks() == (1, 0, 0)
    assert distributed.is_main()
    environment(WORLD_SIZE="4", RANK="3", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    assert launched_ranks() == (4, 3, 1)
    assert not distributed.is_main()
    # One process does not read where the others are; Kubernetes sets MASTER_PORT for a service called "master".
    environment(WORLD_SIZE="1", MASTER_PORT="tcp://10.0.0.1:80")
    assert launched_ranks() == (1, 0, 0)


RANKS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 in the environment, but RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**RANKS, "MASTER_ADDR": ""}, "but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, which is not a number"),
        ({**RANKS, "RANK": "-1"}, "RANK is '-1' in the environment, which is not a number"),
        ({**RANKS, "LOCAL_RANK": "gpu0"}, "LOCAL_RANK is 'gpu0' in the environment, which is not a number"),
        ({**RANKS, "MASTER_PORT": "http"}, "MASTER_PORT is 'http' in the environment, which is not a number"),
        ({"RANK": "3"}, "RANK is 3 in the environment, but WORLD_SIZE is 1"),
        ({**RANKS, "RANK": "2"}, "RANK is 2 in the environment, but WORLD_SIZE is 2"),
    ],
)
def test_an_environment_that_no_launcher_has_set_is_one_line(environment, variables, says):
    environment(**variables)
    with pytest.raises(UsageError) as error, distributed.session("cpu"):
        pass
    assert says in str(error.value)
    assert "torchrun" in str(error.value)
    assert "unset" in str(error.value)
    assert "\n" not in str(error.value)
    assert distributed.is_main()


PROGRAM = """
from utils import cli, distributed

def main():
    with distributed.session("cpu"):
        print("runs")

cli.run(main)
"""


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "x"}, {"RANK": "x"}, {"LOCAL_RANK": "x"}])
def test_a_command_says_so_with_exit_code_2(variables):
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = quick_start.run(["-c", PROGRAM], REPOSITORY, {**clean, **variables})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {next(iter(variables))} is ")
    assert done.stderr.count("\n") == 1


def test_ranks_that_do_not_come_are_one_line(environment, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment(**{**RANKS, "MASTER_PORT": str(port)})
    monkeypatch.setattr(distributed, "START_TIMEOUT", timedelta(seconds=1))
    says = r"rank 0 has not met all 2 ranks .*start them with torchrun, or unset WORLD_SIZE"
    with pytest.raises(RunError, match=says), distributed.session("cpu"):
        pass
