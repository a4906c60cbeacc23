"""Runs that are killed, stopped or fail: what they leave behind, and that they resume as if never interrupted."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import quick_start
from tests.conftest import REPOSITORY, Workspace, script_environment
from tests.in_process import run
from tests.quick_start import TORCHRUN, Process
from utils.checkpoint import (
    LAST,
    NEXT,
    PREVIOUS,
    load_checkpoint,
    newest_readable,
    save_checkpoint,
    save_for_resume,
)
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.files import remove_parts, write_text
from utils.lock import folder_lock
from utils.optim import Stepper
from utils.signals import StopRequest, signal_name

ALONE = Run(0, 1, torch.device("cpu"))
STEPS = ["--set", "trainer.save_freq_step=1", "--set", "trainer.max_epoch=4"]
FEW_STEPS = [*STEPS, "--set", "trainer.max_epoch=2"]  # four or more, of which the third is in the middle of an epoch


def elsewhere(stage: str) -> list[str]:
    folders = {"checkpoints_dir": "checkpoints", "log_dir": "log", "vis_dir": "vis"}
    return [part for key, name in folders.items() for part in ("--set", f"saver.{key}={stage}/{name}")]


def start_under_torchrun(workspace: Workspace, script: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, *TORCHRUN, str(REPOSITORY / script), "--dataset", "tiny", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=workspace.root, env=script_environment(), **pipes)


def wait_for(condition: Callable[[], bool], process: Process | subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def position(folder: Path) -> int:
    try:
        return load_checkpoint(folder / LAST)["position"]["step"]
    except UsageError:
        return 0


def assert_same_state(first_path: Path, second_path: Path) -> None:
    first, second = load_checkpoint(first_path), load_checkpoint(second_path)
    assert first["position"] == second["position"]
    for key in ("state_dict", "ema_state_dict"):
        if key in first:
            assert all(torch.equal(first[key][name], second[key][name]) for name in first[key])
    moments = [content["stepper"]["optimizer"]["state"] for content in (first, second)]
    for key, state in moments[0].items():
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(moments[1][key][name])) for name, value in state.items()
        )


TRAININGS = {"train_diffusion.py": [], "train_classifier.py": [], "train_realnet.py": ["--class_name", "dots"]}
SIGNALS = [(script, signal.SIGTERM) for script in TRAININGS]
SIGNALS += [("train_classifier.py", number) for number in (signal.SIGINT, signal.SIGUSR1)]


def checkpoints_of(workspace: Workspace, stage: str, script: str) -> Path:
    return workspace.out / stage / "checkpoints" / ("dots" if "realnet" in script else "")


@pytest.mark.parametrize(("script", "number"), SIGNALS, ids=[f"{script}-{number.name}" for script, number in SIGNALS])
def test_a_stopped_training_resumes_bit_for_bit(script, number, workspace, monkeypatch, capsys):
    """The signal arrives in the middle of the third step."""
    whole, stopped = f"whole_{script}", f"stopped_{script}_{number}"
    main = importlib.import_module(Path(script).stem).main

    def train(stage: str, *more: str) -> tuple[int, str, str]:
        command = ["--dataset", "tiny", "--device", "cpu", *TRAININGS[script], *elsewhere(stage), *FEW_STEPS, *more]
        return run(main, command, workspace.root, monkeypatch, capsys)

    if not (workspace.out / whole).exists():
        assert train(whole)[0] == 0
    folder = checkpoints_of(workspace, stopped, script)
    steps, step = [], Stepper.step

    def signalled(stepper: Stepper, factor: float) -> None:
        steps.append(len(steps) + 1)
        if len(steps) == 3:
            assert signal.getsignal(number) != signal.SIG_DFL
            os.kill(os.getpid(), number)
        step(stepper, factor)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", signalled)
        code, out, err = train(stopped)
    assert (code, err) == (128 + number, "")
    assert f"{signal_name(number)}: saved after step 3; the same command with --resume continues" in out
    assert position(folder) == 3
    code, out, err = train(stopped, "--resume")
    assert (code, err) == (0, "")
    assert "step 3" in out
    assert_same_state(checkpoints_of(workspace, whole, script) / LAST, folder / LAST)
    assert list(folder.glob(".*")) == []


@pytest.mark.parametrize("script", TRAININGS)
def test_max_step_ends_in_the_middle_of_an_epoch_and_a_resumed_run_goes_on(script, workspace, monkeypatch, capsys):
    """Three steps, then the rest: the same as at once; also with a schedule and averaged weights."""
    whole, parts = f"schedule_whole_{script}", f"schedule_parts_{script}"
    main = importlib.import_module(Path(script).stem).main
    schedule = ["trainer.schedule={type: constant, warmup_steps: 4}", "trainer.ema_decay=0.5"]
    options = [argument for setting in schedule for argument in ("--set", setting)]

    def train(stage: str, *more: str) -> tuple[int, str, str]:
        common = ["--dataset", "tiny", "--device", "cpu", *TRAININGS[script]]
        command = [*common, *elsewhere(stage), *FEW_STEPS, *options, *more]
        return run(main, command, workspace.root, monkeypatch, capsys)

    assert train(whole)[0] == 0
    assert train(parts, "--set", "trainer.max_step=3")[0] == 0
    folder = checkpoints_of(workspace, parts, script)
    assert position(folder) == 3
    code, out, _ = train(parts, "--set", "trainer.max_step=3", "--resume")
    assert code == 0
    assert "nothing is left to do: 3 steps (trainer.max_step) are done" in out
    code, _, err = train(parts, "--resume")
    assert (code, err) == (0, "")
    assert_same_state(checkpoints_of(workspace, whole, script) / LAST, folder / LAST)


@pytest.mark.parametrize("script", TRAININGS)
def test_a_last_validation_that_was_stopped_is_made_when_the_run_is_resumed(script, workspace, monkeypatch, capsys):
    """Else there is no checkpoint to use: the best one and the numbered ones are written after it."""
    module = importlib.import_module(Path(script).stem)
    stage = f"validation_{script}"
    steps = ["--set", "trainer.max_step=3"]
    command = ["--dataset", "tiny", "--device", "cpu", *TRAININGS[script], *elsewhere(stage), *steps]

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    validate = module.validate
    with monkeypatch.context() as patched:
        patched.setattr(module, "validate", stopped)
        code, out, _ = run(module.main, command, workspace.root, monkeypatch, capsys)
    assert code == 128 + signal.SIGTERM
    assert "in the validation; the same command with --resume continues" in out
    code, out, err = run(module.main, [*command, "--resume"], workspace.root, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert "nothing is left to do" not in out
    used = "ckpt_best.pth.tar" if "realnet" in script else "ckpt_[0-9]*.pth.tar"
    assert len(list(checkpoints_of(workspace, stage, script).glob(used))) == 1
    _, out, _ = run(module.main, [*command, "--resume"], workspace.root, monkeypatch, capsys)
    assert "nothing is left to do" in out


def test_a_process_that_gets_a_signal_saves_and_ends(workspace):
    folder = checkpoints_of(workspace, "signalled", "realnet")
    arguments = ["--class_name", "dots", *elsewhere("signalled"), *STEPS, "--set", "trainer.max_epoch=300"]
    process = workspace.start("train_realnet.py", *arguments)
    wait_for(lambda: (folder / LAST).is_file(), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert err == ""
    assert f"SIGTERM: saved after step {position(folder)}" in out
    assert list(folder.glob(".*")) == []


def test_a_killed_training_resumes_bit_for_bit_with_two_ranks(workspace):
    arguments = ["--class_name", "dots", *STEPS]
    workspace.run("train_realnet.py", *arguments, *elsewhere("whole_ranks"), ranks=2)
    folder = checkpoints_of(workspace, "killed_ranks", "realnet")
    process = start_under_torchrun(workspace, "train_realnet.py", *arguments, *elsewhere("killed_ranks"))
    wait_for(lambda: (folder / PREVIOUS).is_file(), process)
    # Kill one rank: the job ends within a minute, and says so.
    killed = children_of(process.pid)[-1]
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert "connection to another rank is lost" in err or "Signal 9" in err
    assert all(not Path(f"/proc/{pid}").exists() for pid in (killed,))
    done = workspace.run("train_realnet.py", *arguments, *elsewhere("killed_ranks"), "--resume", ranks=2)
    assert "resumed" in done.stdout
    last = checkpoints_of(workspace, "whole_ranks", "realnet") / LAST
    assert_same_state(last, folder / LAST)


def children_of(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listing.stdout.split()]


@pytest.mark.parametrize("training", [False, True], ids=["starting", "training"])
def test_ranks_end_when_their_launcher_is_killed(training, workspace):
    folder = workspace.out / f"no_launcher_{training}"
    arguments = [*elsewhere(folder.name), *STEPS, "--set", "trainer.max_epoch=500"]
    process = start_under_torchrun(workspace, "train_diffusion.py", *arguments)
    if training:
        wait_for(lambda: (folder / "checkpoints" / LAST).is_file(), process)
    else:
        wait_for(lambda: len(children_of(process.pid)) >= 2, process)
    process.kill()
    # This waits for the ranks, which hold the other ends of the pipes, and may have libraries to import before.
    _, err = process.communicate(timeout=200)
    assert "the launcher has ended" in err
    # The ranks' unfinished files stay until a run resumes; delete them, as other tests look for leftovers.
    shutil.rmtree(folder, ignore_errors=True)


def test_two_ranks_with_loader_workers_stop_at_the_same_step(workspace):
    folder = workspace.out / "ranks_stop/checkpoints"
    # The launcher signals whole process groups, which include loader workers.
    arguments = [*elsewhere("ranks_stop"), *STEPS, "--set", "trainer.max_epoch=500", "--set", "dataset.workers=1"]
    process = start_under_torchrun(workspace, "train_diffusion.py", *arguments)
    wait_for(lambda: (folder / LAST).is_file(), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "SIGTERM: saved after step" in out, err
    steps = position(folder)
    arguments = [*elsewhere("ranks_stop"), "--set", "trainer.max_epoch=1", "--resume"]
    done = workspace.run("train_diffusion.py", *arguments, ranks=2)
    assert f"step {steps}" in done.stdout


def test_killed_sampling_later_draws_the_rest(workspace):
    if not (workspace.out / "diffusion_checkpoints").exists():
        workspace.run("train_diffusion.py")
    arguments = ["--no-classifier", "--class_name", "dots", "--set", "sample_number=12"]
    workspace.run("sample.py", *arguments, "--set", "workspace.root=data/tiny/drawn_whole")
    root = workspace.data / "drawn_killed/dots"
    process = workspace.start("sample.py", *arguments, "--set", "workspace.root=data/tiny/drawn_killed")
    wait_for(lambda: len(list(root.glob("rank*.jpg"))) > 2, process)
    process.kill()
    process.communicate()
    (root / ".part-left.jpg").write_bytes(b"half")
    workspace.run("sample.py", *arguments, "--set", "workspace.root=data/tiny/drawn_killed")
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (workspace.data / "drawn_whole/dots", root)
    )
    assert first == second
    assert sum(name.endswith(".jpg") for name in first) == 12
    assert "strengths.csv" in first


def test_sampling_that_is_asked_to_stop_finishes_its_batch(workspace):
    if not (workspace.out / "diffusion_checkpoints").exists():
        workspace.run("train_diffusion.py")
    arguments = ["--no-classifier", "--class_name", "dots", "--set", "sample_number=3000"]
    root = workspace.data / "drawn_stopped/dots"
    process = workspace.start("sample.py", *arguments, "--set", "workspace.root=data/tiny/drawn_stopped")
    wait_for(lambda: len(list(root.glob("rank*.jpg"))) > 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped; the same command without --overwrite goes on" in out
    assert len(list(root.glob("rank*.jpg"))) % 3 == 0
    assert [path.name for path in root.glob(".*")] == [".strengths.rank0.jsonl"]  # to go on from


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog):
    for step in (1, 2):
        save_for_resume(tmp_path, {"step": step})
    newest = tmp_path / LAST
    newest.write_bytes(newest.read_bytes()[:100])
    with caplog.at_level("WARNING", logger="realnet"):
        assert newest_readable(tmp_path) == (tmp_path / PREVIOUS, {"step": 1})
    assert LAST in caplog.text
    assert "is used instead" in caplog.text
    # The damaged checkpoint does not replace the good one.
    save_for_resume(tmp_path, {"step": 3})
    assert newest_readable(tmp_path) == (tmp_path / LAST, {"step": 3})
    assert load_checkpoint(tmp_path / LAST) == {"step": 3}


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    assert newest_readable(tmp_path) is None
    (tmp_path / LAST).write_bytes(b"nothing")
    with pytest.raises(UsageError, match=LAST):
        newest_readable(tmp_path)


def test_a_checkpoint_exists_at_every_moment(tmp_path, monkeypatch):
    save_for_resume(tmp_path, {"step": 1})

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    for moment in ("utils.checkpoint.save_checkpoint", "pathlib.Path.replace", "utils.checkpoint._move_into_place"):
        with monkeypatch.context() as patched:
            patched.setattr(moment, crash)
            with pytest.raises(KeyboardInterrupt):
                save_for_resume(tmp_path, {"step": 2})
        # What was saved whole before the crash is used, and moved into its place.
        saved = moment.endswith("_move_into_place")
        assert newest_readable(tmp_path) == (tmp_path / LAST, {"step": 2 if saved else 1})
        remove_parts(tmp_path)
        left = [LAST, PREVIOUS] if saved else [LAST]
        assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_damaged_next_checkpoint_is_not_used(tmp_path):
    save_for_resume(tmp_path, {"step": 1})
    (tmp_path / NEXT).write_bytes((tmp_path / LAST).read_bytes()[:-30])
    assert newest_readable(tmp_path) == (tmp_path / LAST, {"step": 1})
    assert (tmp_path / f"{NEXT}.damaged").is_file()


def test_equal_contents_give_equal_bytes(tmp_path):
    content = {"epoch": 3, "state_dict": {"w": torch.arange(6.0)}}
    for name in ("a", "b"):
        save_checkpoint(tmp_path / f"{name}.pth.tar", content)
    assert (tmp_path / "a.pth.tar").read_bytes() == (tmp_path / "b.pth.tar").read_bytes()


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/bin/mount").exists(), reason="a small file system needs root")
def test_a_full_disk_damages_nothing(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=False).returncode:
        pytest.xfail("this machine mounts no file system")
    try:
        save_checkpoint(small / "ckpt.pth.tar", {"weights": torch.zeros(100_000)})
        with pytest.raises(RunError, match="No space left on device"):
            save_checkpoint(small / "ckpt.pth.tar", {"weights": torch.ones(400_000)})
        assert not load_checkpoint(small / "ckpt.pth.tar")["weights"].any()
        assert [path.name for path in small.iterdir()] == ["ckpt.pth.tar"]
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# ---- one run per folder ----------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_with_the_first_one_s_process(workspace):
    folder = workspace.out / "locked/checkpoints"
    arguments = [*elsewhere("locked"), *STEPS, "--set", "trainer.max_epoch=300"]
    process = workspace.start("train_classifier.py", *arguments)
    try:
        wait_for(lambda: (folder / LAST).is_file(), process)
        done = workspace.run("train_classifier.py", *arguments, code=2)
        assert f"process {process.pid} on {socket.gethostname()} writes here" in done.stderr
    finally:
        process.kill()
        process.communicate()
    # The process has ended, so its lock does not count.
    assert (folder / ".lock").exists()
    workspace.run("train_classifier.py", *elsewhere("locked"), "--set", "trainer.max_epoch=1", "--resume")
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("text", ["", "{", '{"pid": "x"}'])
def test_an_unreadable_lock_that_is_old_does_not_count(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    os.utime(tmp_path / ".lock", (0, 0))
    with folder_lock(tmp_path, ALONE):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_of_another_host_counts(tmp_path):
    write_text(tmp_path / ".lock", json.dumps({"pid": 1, "host": "elsewhere", "since": time.time()}))
    with pytest.raises(UsageError, match="process 1 on elsewhere"), folder_lock(tmp_path, ALONE):
        pass


def test_a_later_process_of_the_same_number_does_not_count(tmp_path):
    write_text(tmp_path / ".lock", json.dumps({"pid": os.getppid(), "host": socket.gethostname(), "since": 1.0}))
    with folder_lock(tmp_path, ALONE):
        pass


# ---- signals and ranks -----------------------------------------------------------------------------------------------


def test_a_second_signal_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    request = StopRequest(ALONE)
    request.receive(signal.SIGTERM, None)
    request.receive(signal.SIGTERM, None)
    assert request.agreed() == signal.SIGTERM
    # A launcher's copy of the terminal's signal does not count as a second one.
    assert ended == []
    request.since -= 2
    request.receive(signal.SIGINT, None)
    assert ended == [128 + signal.SIGINT]


def test_an_error_of_one_rank_only_is_reported(workspace, tmp_path):
    (tmp_path / "fail.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from utils import cli, distributed\n"
        "from utils.errors import RunError\n"
        "def main():\n"
        "    with distributed.session('cpu') as run:\n"
        "        if run.rank == 1:\n"
        "            raise RunError('rank one has no disk')\n"
        "        distributed.barrier()\n"
        "cli.run(main)\n"
    )
    began = time.monotonic()
    done = quick_start.run([str(tmp_path / "fail.py")], tmp_path, script_environment(), ranks=2)
    assert done.returncode != 0
    assert "rank 1: rank one has no disk" in done.stderr
    assert time.monotonic() - began < 60


# ---- divergence ------------------------------------------------------------------------------------------------------


def test_a_training_that_diverges_stops_with_the_last_good_checkpoint(workspace):
    arguments = [*elsewhere("diverged"), "--class_name", "dots", "--set", "trainer.max_bad_steps=1"]
    arguments += ["--set", "trainer.save_freq_step=1", "--set", "trainer.max_epoch=30"]
    # Finite steps, but so large that float32 features overflow after a few of them.
    arguments += ["--set", "trainer.optimizer={type: SGD, kwargs: {lr: 10000}}"]
    done = workspace.run("train_realnet.py", *arguments, code=1)
    assert "not finite in 2 steps in a row (trainer.max_bad_steps: 1)" in done.stderr
    assert f"diverged/checkpoints/dots/{LAST}" in done.stderr
    assert load_checkpoint(workspace.out / f"diverged/checkpoints/dots/{LAST}")["position"]["step"] >= 1
