"""predict.py --watch: images that arrive in a folder, and the command for anomalous ones."""

import csv
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
from evaluation import anomaly_command, watching
from evaluation.anomaly_command import CommandQueue, parse_command
from evaluation.detector import Detector
from evaluation.watching import FolderWatch
from tests import quick_start
from tests.conftest import REPOSITORY, script_environment
from tests.in_process import run
from tests.layout_trees import image_file
from utils.errors import UsageError
from utils.log import log_to_terminal

CLASS_FOLDER = "experiments/tiny/predict_checkpoints/dots"
ALL = ("--threshold", "0")  # so that every image is anomalous
# Appends what a command is given to the file that its first argument names.
RECORD = """
import json, os, sys
told = {name: value for name, value in os.environ.items() if name.startswith("REALNET_")}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps({"words": sys.argv[2:], "told": told}) + chr(10))
"""


@pytest.fixture
def watch(detector, tmp_path, monkeypatch, capsys):
    """Runs predict.py --watch; in the pauses between its looks, one action after the other, and then SIGTERM."""

    def call(*actions, options=ALL, folder=tmp_path / "in", output="out"):
        following = iter(actions)

        def pause(seconds, stop):
            action = next(following, None)
            if action is None:
                stop.signal = signal.SIGTERM
            else:
                action()

        monkeypatch.setattr(predict, "pause", pause)
        arguments = ["--checkpoint", CLASS_FOLDER, "--watch", str(folder), "--output", str(tmp_path / output), *options]
        code, out, err = run(predict.main, arguments, detector.root, monkeypatch, capsys)
        return code, out, err, rows(tmp_path / output)

    return call


def rows(output: Path) -> list[dict]:
    """The lines of scores.csv, which agree with those of scores.jsonl."""
    if not output.exists():
        return []
    with open(output / "scores.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    # The table has an apostrophe before what spreadsheets would take for a formula.
    assert [row["file"].lstrip("'") for row in table] == [line["file"] for line in lines]
    return lines


def nothing() -> None:
    """A pause in which nothing arrives."""


def written(path: Path, seed: object, at: int) -> Path:
    """An image file with a modification time."""
    os.utime(image_file(path, seed), ns=(at, at))
    return path


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_images_are_scored_in_the_order_of_arrival_once_they_are_complete(watch, tmp_path):
    folder, whole = tmp_path / "in", image_file(tmp_path / "whole.png", 7).read_bytes()
    written(folder / "b.png", 1, at=5)
    written(folder / "a.png", 2, at=9)

    def grows():
        with open(folder / "c.png", "ab") as file:
            file.write(whole[file.tell() :][: len(whole) // 2 + 1])

    code, out, err, lines = watch(
        nothing,
        grows,
        lambda: (grows(), image_file(folder / "lot 1/d.png", 3)),
        nothing,
        nothing,
    )
    assert (code, err) == (0, "")
    assert [line["file"] for line in lines] == ["b.png", "a.png", "c.png", "lot 1/d.png"]
    assert out.count("  anomalous  ") == 4
    assert "4 images, 4 anomalous, 0 that could not be scored" in out
    for line in lines:
        assert (tmp_path / "out" / line["heatmap"]).is_file()


def test_the_results_are_those_of_a_prediction_and_go_on_from_them(watch, score, tmp_path):
    for i in range(3):
        image_file(tmp_path / f"in/{i}.png", i)
    expected = score(tmp_path / "in", *ALL)[3]
    found = watch(nothing, nothing, output="watched")[3]
    assert {line["file"]: {**line, "score": None} for line in found} == {
        name: {**line, "score": None} for name, line in expected.items()
    }
    for line in found:
        assert line["score"] == pytest.approx(expected[line["file"]]["score"], abs=1e-5)
    code, out, _, lines = watch(lambda: image_file(tmp_path / "in/new.png", "new"), nothing, nothing)
    assert code == 0
    assert "(3 images were scored before)" in out
    assert out.count("  anomalous  ") == 1
    assert [line["file"] for line in lines] == ["0.png", "1.png", "2.png", "new.png"]


def test_a_broken_image_is_named_once_and_scored_when_it_is_whole(watch, tmp_path):
    folder = tmp_path / "in"
    image_file(folder / "a.png", 1)
    (folder / "b.png").write_bytes(b"no image")

    def still_broken():
        (folder / "b.png").write_bytes(b"no image either")

    code, out, err, lines = watch(nothing, nothing, still_broken, nothing, nothing)
    assert code == 0
    assert [line["file"] for line in lines] == ["a.png"]
    assert err.count("unreadable: ") == 1
    assert f"{folder / 'b.png'} is not a readable image" in err
    assert "1 that could not be scored" in out
    code, out, err, lines = watch(nothing, nothing, lambda: image_file(folder / "b.png", 2), nothing, nothing)
    assert [line["file"] for line in lines] == ["a.png", "b.png"]
    assert err.count("unreadable: ") == 1
    assert "0 that could not be scored" in out


def test_a_signal_lets_what_is_in_hand_be_written_and_a_restart_scores_the_others(watch, tmp_path, monkeypatch):
    for i in range(30):
        image_file(tmp_path / f"in/{i:02d}.png", i)
    maps, calls = Detector.maps, []

    def signalled(self, images):
        calls.append(len(images))
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return maps(self, images)

    monkeypatch.setattr(Detector, "maps", signalled)
    options = (*ALL, "--batch-size", "2", "--no-pictures")
    code, _, err, lines = watch(nothing, nothing, options=options)
    assert (code, err) == (0, "")
    assert 2 <= len(lines) < 30
    # A kill in the middle of a line.
    for name, text in (("scores.jsonl", '{"file": "29.png", "sco'), ("scores.csv", "29.png,0.1")):
        with open(tmp_path / "out" / name, "a") as file:
            file.write(text)
    before = sum(calls)
    code, _, _, again = watch(nothing, nothing, options=options)
    assert code == 0
    assert again[: len(lines)] == lines
    assert {line["file"] for line in again} == {f"{i:02d}.png" for i in range(30)}
    assert len(again) == 30
    assert sum(calls) - before == 30 - len(lines)


def test_images_that_fail_do_not_end_the_watch(watch, tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        image_file(tmp_path / "in" / name, name)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "in/white.png")
    maps = Detector.maps

    def spoiled(self, images):
        values = maps(self, images).copy()
        values[[image.min() == 255 for image in images]] = np.nan
        return values

    monkeypatch.setattr(Detector, "maps", spoiled)
    code, out, err, lines = watch(nothing, nothing, nothing, nothing)
    assert code == 0
    assert sorted(line["file"] for line in lines) == ["a.png", "b.png"]
    assert err.count("not scored: ") == 1
    assert "1 that could not be scored" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--watch", "gone"], "--watch gone: is not a folder"),
        (["--watch", "in", "--interval", "0"], "--interval 0: has to be a number of seconds above 0"),
        (["--watch", "in", "--interval", "nan"], "--interval nan"),
        (["--input", "in", "--interval", "2"], "--interval needs --watch"),
        (["--input", "in", "--on-anomaly", "echo"], "--on-anomaly needs --watch"),
        (["--watch", "in", "--on-anomaly", "no-such-program {}"], "no-such-program is no program that can be run"),
    ],
)
def test_wrong_use_is_one_line(options, says, detector, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    arguments = ["--checkpoint", str(detector.root / CLASS_FOLDER), "--output", "out", *options]
    code, _, err = run(predict.main, arguments, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_command_without_a_threshold_is_refused(detector, tmp_path, monkeypatch, capsys):
    shutil.copy(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar", tmp_path / "alone.pth.tar")
    (tmp_path / "in").mkdir()
    options = ["--watch", "in", "--output", "out", "--on-anomaly", f"{sys.executable} {{}}"]
    code, _, err = run(predict.main, ["--checkpoint", "alone.pth.tar", *options], tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "--on-anomaly: there is no threshold" in err


# ---- the folder ------------------------------------------------------------------------------------------------------


def names(images: list) -> list[str]:
    return [image.name for image in images]


def test_known_files_are_not_asked_for_again(tmp_path, monkeypatch):
    for i in range(200):
        (tmp_path / f"in/{i}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"in/{i}.png").write_bytes(b"x")
    asked, stamp = [], FolderWatch._stamp
    monkeypatch.setattr(FolderWatch, "_stamp", lambda self, name: asked.append(name) or stamp(self, name))
    folder = FolderWatch(tmp_path / "in", tmp_path / "out", done={f"{i}.png" for i in range(100)})
    assert names(folder.look()) == []
    assert len(names(folder.look())) == 100
    assert len(asked) == 200
    (tmp_path / "in/new.png").write_bytes(b"x")
    assert names(folder.look()) == []
    assert names(folder.look()) == ["new.png"]
    assert asked[200:] == ["new.png", "new.png"]


def test_a_file_is_waited_for_while_its_size_or_its_time_changes(tmp_path):
    path = tmp_path / "in/a.png"
    path.parent.mkdir()
    path.write_bytes(b"1")
    folder = FolderWatch(tmp_path / "in", tmp_path / "out")
    for change in (
        lambda: path.write_bytes(b"12"),
        lambda: os.utime(path, ns=(5, 5)),
        lambda: os.utime(path, ns=(6, 6)),
    ):
        assert names(folder.look()) == []
        change()
    assert names(folder.look()) == []
    # A file that arrives later is complete at the same look, but comes after it.
    (tmp_path / "in/0.png").write_bytes(b"1")
    assert names(folder.look()) == ["a.png"]
    assert names(folder.look()) == ["0.png"]


def test_what_a_prediction_leaves_out_is_left_out(tmp_path):
    folder = tmp_path / "in"
    images = ("a.png", "lot/b.JPG", "lonely_mask.png")
    others = ("a_mask.png", ".hidden.png", ".d/x.png", "ground_truth/a.png", "out/heatmaps/a.png", "notes.txt")
    for name in (*images, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "lot/up").symlink_to("..")
    looked = FolderWatch(folder, folder / "out")
    looked.look()
    assert sorted(names(looked.look())) == sorted(images)


def test_a_folder_that_cannot_be_opened_for_a_while_is_said_once(tmp_path, capsys):
    log_to_terminal()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"x")
    folder = FolderWatch(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "away")
    for _ in range(3):
        assert names(folder.look()) == []
    (tmp_path / "away").rename(tmp_path / "in")
    folder.look()
    assert names(folder.look()) == ["a.png"]
    out = capsys.readouterr().out
    assert out.count("cannot be opened (No such file or directory); it is tried again") == 1
    assert out.count("can be opened again") == 1


def test_a_pause_ends_when_a_signal_arrives(monkeypatch):
    class Stop:
        signal = 0

    clock, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds
        Stop.signal = 15 if len(slept) == 3 else 0

    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watching.time, "sleep", sleep)
    watching.pause(60, Stop)
    assert len(slept) == 3
    assert sum(slept) < 1
    Stop.signal = 0
    watching.pause(0.25, Stop)
    assert sum(slept[3:]) == pytest.approx(0.25)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_gets_each_anomalous_image_and_nothing_of_a_name_is_run(watch, tmp_path):
    hostile = ["$(touch pwned).png", "`touch pwned`.png", "a; touch pwned;.png", "-rf.png", "two\nlines.png", "{}.png"]
    for name in hostile:
        image_file(tmp_path / "in" / name, name)
    (tmp_path / "record.py").write_text(RECORD)
    command = f"'{sys.executable}' '{tmp_path / 'record.py'}' '{tmp_path / 'told'}' 'two words' {{}}"
    code, _, err, lines = watch(nothing, nothing, options=(*ALL, "--on-anomaly", command))
    assert code == 0, err
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    paths = [str(tmp_path / "in" / line["file"]) for line in lines]
    assert len(paths) == len(hostile)
    assert [entry["words"] for entry in told] == [["two words", path] for path in paths]
    for entry, line, path in zip(told, lines, paths, strict=True):
        assert entry["told"] == {
            "REALNET_IMAGE": path,
            "REALNET_SCORE": f"{line['score']:.6f}",
            "REALNET_THRESHOLD": "0.0",
            "REALNET_HEATMAP": str(tmp_path / "out" / line["heatmap"]),
            "REALNET_MASK": str(tmp_path / "out" / line["mask"]),
        }
    assert not list(tmp_path.rglob("pwned"))
    # Normal images have no alarm.
    (tmp_path / "told").unlink()
    watch(nothing, nothing, options=("--threshold", "2", "--on-anomaly", command), output="normal")
    assert len(rows(tmp_path / "normal")) == len(hostile)
    assert not (tmp_path / "told").exists()


def test_a_slow_command_does_not_hold_up_the_scores_and_none_is_lost(watch, tmp_path):
    for i in range(3):
        image_file(tmp_path / f"in/{i}.png", i)
    code = "import os, sys, time, pathlib\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
    code += "with open(sys.argv[2], 'a') as file: file.write(os.environ['REALNET_IMAGE'] + chr(10))"
    (tmp_path / "slow.py").write_text(code)

    def all_scored():
        assert len(rows(tmp_path / "out")) == 3
        assert not (tmp_path / "told").exists()
        (tmp_path / "go").touch()

    command = f"'{sys.executable}' '{tmp_path / 'slow.py'}' '{tmp_path / 'go'}' '{tmp_path / 'told'}'"
    assert watch(nothing, all_scored, options=(*ALL, "--on-anomaly", command))[0] == 0
    paths = [str(tmp_path / "in" / line["file"]) for line in rows(tmp_path / "out")]
    assert (tmp_path / "told").read_text().splitlines() == paths


@pytest.mark.skipif(os.name == "nt", reason="POSIX shell")
def test_commands_that_fail_or_hang_are_logged_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    log_to_terminal()
    monkeypatch.setattr(anomaly_command, "SECONDS", 0.3)
    script = 'case "$REALNET_IMAGE" in *bad*) exit 3;; *hangs*) sleep 60;; *) echo "$KIND" >> told;; esac'
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with CommandQueue(["sh", "-c", script]) as commands:
        for name in ("bad", "hangs", "good"):
            commands.add(Path(name), {"KIND": name})
    assert time.monotonic() - start < 20
    assert (tmp_path / "told").read_text() == "good\n"
    out = capsys.readouterr().out
    assert f"warning: --on-anomaly: exit code 3 for {tmp_path / 'bad'}" in out
    assert f"warning: --on-anomaly: killed after 0.3 seconds for {tmp_path / 'hangs'}" in out
    with CommandQueue([str(tmp_path)]) as commands:
        commands.add(Path("x"), {})
    assert f"{tmp_path} cannot be run (Permission denied) for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing is no program"),
        ("no-such-program", "no-such-program is no program that can be run"),
        ("sh -c 'unclosed", "no closing quotation"),
        ("sh -c 'mail {}'", "{} has to be a word of its own"),
        ("sh --image={}", "{} has to be a word of its own"),
        ("./alarm.bat {}", "a batch file cannot take {} safely"),
    ],
)
def test_commands_that_cannot_be_run_safely_are_refused(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alarm.bat").touch(mode=0o755)
    with pytest.raises(UsageError) as refused:
        parse_command(text)
    assert says in str(refused.value)


# ---- a real process --------------------------------------------------------------------------------------------------


def test_a_process_scores_what_arrives_until_it_is_stopped(detector, tmp_path):
    image_file(tmp_path / "in/before.png", 1)
    command = [str(REPOSITORY / "predict.py"), "--checkpoint", CLASS_FOLDER, "--device", "cpu"]
    command += ["--watch", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--interval", "0.05", *ALL]
    process = quick_start.Process(command, detector.root, script_environment())
    try:
        process.wait_for("anomalous  before.png")
        image_file(tmp_path / "in/after.png", 2)
        process.wait_for("anomalous  after.png")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
    assert "2 images, 2 anomalous, 0 that could not be scored" in out
    assert [line["file"] for line in rows(tmp_path / "out")] == ["before.png", "after.png"]
    assert not list(tmp_path.glob("out/.*"))
