"""Two nodes give what one node with two ranks gives."""

import socket
import subprocess
import sys

import torch

import evaluation_realnet
import sample
from tests.conftest import REPOSITORY, script_environment
from tests.in_process import run
from utils.checkpoint import BEST, LAST, load_checkpoint


def under_two_launchers(workspace, script, *arguments):
    """Run a script with one rank on each of two nodes of this machine, whose launchers meet at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, processes = free.getsockname()[1], []
    for node in range(2):
        where = ["--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node=1"]
        command += [str(REPOSITORY / script), "--dataset", "tiny", "--device", "cpu", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=workspace.root, env=script_environment(), **pipes))
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


def given(*values):
    return [part for value in values for part in ("--set", value)]


def test_training_and_evaluation(workspace, monkeypatch, capsys):
    def folders(name):
        keys = ("checkpoints", "log", "vis", "results")
        return ["--class_name", "dots", *given(*(f"saver.{key}_dir={name}/{key}/" for key in keys))]

    training = given("trainer.max_epoch=1")
    under_two_launchers(workspace, "train_realnet.py", *folders("nodes"), *training)
    workspace.run("train_realnet.py", *folders("node"), *training, ranks=2)
    two, one = (load_checkpoint(workspace.out / name / "checkpoints/dots" / LAST) for name in ("nodes", "node"))
    assert two["epoch"] == one["epoch"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name

    workspace.run("evaluation_realnet.py", *folders("nodes"), ranks=2, nodes=2)
    best = workspace.out / "nodes/checkpoints/dots" / BEST
    alone = ["--dataset", "tiny", "--device", "cpu", *folders("alone"), "--checkpoint", str(best)]
    assert run(evaluation_realnet.main, alone, workspace.root, monkeypatch, capsys)[0] == 0
    tables = [(workspace.out / name / "results/metrics.csv").read_text() for name in ("nodes", "alone")]
    assert tables[0] == tables[1]


def test_sampling(workspace, monkeypatch, capsys):
    own = ("saver.checkpoints_dir=nodes/diffusion/", "saver.log_dir=nodes/diffusion_log/", "saver.vis_dir=nodes/vis/")
    workspace.run("train_diffusion.py", *given("trainer.max_epoch=1", *own))
    trained = "unet.pertrain_path=experiments/tiny/nodes/diffusion/"
    drawn = {}
    for name in ("nodes", "alone"):
        options = given(f"workspace.root={name}", "classifier=null", "sample_number=3", trained)
        if name == "nodes":
            workspace.run("sample.py", *options, ranks=2, nodes=2)
        else:
            options = ["--dataset", "tiny", "--device", "cpu", *options]
            assert run(sample.main, options, workspace.root, monkeypatch, capsys)[0] == 0
        files = (workspace.root / name).rglob("*.jpg")
        drawn[name] = {path.parent.name + path.name.partition("_")[2]: path.read_bytes() for path in files}
    assert len(drawn["alone"]) == 6
    assert drawn["nodes"] == drawn["alone"]
