"""Two ranks with a criterion that reaches one network only, and ranks that were started differently."""

from tests import quick_start
from tests.conftest import REPOSITORY, script_environment
from tests.utils.test_watchdog import start_ranks


def test_one_loss_alone_trains_on_two_ranks(workspace):
    feature = "criterion=[{name: f, type: FeatureMSELoss}]"
    entropy = "criterion=[{name: c, type: SegmentCrossEntropyLoss}]"
    for i, options in enumerate(([feature], [entropy, "net.rrs.kwargs.stop_grad=True"])):
        folders = [f"saver.{key}=alone{i}/{key}/" for key in ("checkpoints_dir", "log_dir", "vis_dir")]
        settings = [part for value in [*options, *folders, "trainer.max_epoch=1"] for part in ("--set", value)]
        done = workspace.run("train_realnet.py", "--class_name", "dots", *settings, ranks=2)
        assert "which is frozen" in done.stdout
        assert (workspace.out / f"alone{i}/checkpoints_dir/dots/ckpt_best.pth.tar").is_file()


SCRIPT = """
import os, sys
sys.argv = ["train_realnet.py", "--dataset", "tiny", "--class_name", os.environ["CLASS"], *sys.argv[1:]]
sys.path.insert(0, os.environ["PROGRAM"])
os.chdir(os.environ["PLACE"])
import train_realnet
from utils import cli
cli.run(train_realnet.main)
"""


def test_ranks_with_another_class_end_at_once(workspace, monkeypatch):
    for name, value in (("CLASS", "dots"), ("PROGRAM", str(REPOSITORY)), ("PLACE", str(workspace.root))):
        monkeypatch.setenv(name, value)
    processes = start_ranks(SCRIPT, CLASS="lines")
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 0 and rank 1 differ: command: " in outputs[0][1]
    assert "Traceback" not in outputs[0][1] + outputs[1][1]


def test_a_missing_rank_is_waited_for_with_a_line(monkeypatch):
    program = """
from datetime import timedelta
from utils import cli, distributed

distributed.START_TIMEOUT, distributed.WAITING_SECONDS = timedelta(seconds=4), 1.0

def main():
    with distributed.session("cpu"):
        pass

cli.run(main)
"""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = quick_start.run(["-c", program], REPOSITORY, script_environment())
    assert done.returncode == 1
    waiting, error = done.stderr.strip().splitlines()
    assert waiting == "rank 0: waiting for 2 ranks at 127.0.0.1:29777, for up to 0.0666667 minutes"
    assert error.startswith("error: rank 0 has not met all 2 ranks at 127.0.0.1:29777")
