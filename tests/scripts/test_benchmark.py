"""The benchmark: its table, and what it does after kills, failures and changes. Most cells are stand-ins."""

import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmark
from benchmark import parse_variant
from evaluation import benchmark_cell
from evaluation.benchmark_table import Benchmark, Figure
from tests.conftest import REPOSITORY, Workspace
from tests.in_process import run
from tests.quick_start import Process
from tests.scripts.benchmark_stubs import write_stubs
from utils import processes
from utils.errors import UsageError

STEPS = 6
COMMAND = ["--dataset", "tiny", "--class_name", "all", "--seeds", "1", "2", "--set", f"trainer.max_epoch={STEPS}"]
# The command in a process of its own, with the stand-ins in place of the scripts.
LAUNCH = """
import sys
from pathlib import Path
import benchmark
from evaluation import benchmark_cell
from utils import cli
benchmark.REPOSITORY = benchmark_cell.REPOSITORY = Path(sys.argv.pop(1))
cli.run(benchmark.main)
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> Path:
    return write_stubs(tmp_path_factory.mktemp("stubs"))


@pytest.fixture
def bench(stubs, workspace, tmp_path, monkeypatch, capsys):
    """Runs the command in this process with stand-ins; its folder is tmp_path/out."""
    monkeypatch.setattr(benchmark, "REPOSITORY", stubs)
    monkeypatch.setattr(benchmark_cell, "REPOSITORY", stubs)

    def call(*more: str) -> tuple[int, str, str]:
        command = [*COMMAND, "--device", "cpu", "--output", str(tmp_path / "out"), *more]
        return run(benchmark.main, command, workspace.root, monkeypatch, capsys)

    return call


def value_at(name: str, seed: int, step: int) -> float:
    return random.Random(f"{name} {seed} {step}").random()


def best_and_last(name: str) -> tuple[list[float], list[float]]:
    """The best and the last value of the stand-in trainings of both seeds."""
    values = [[value_at(name, seed, step + 1) for step in range(STEPS)] for seed in (1, 2)]
    return [max(line) for line in values], [line[-1] for line in values]


def table(folder: Path) -> list[dict]:
    """The lines of benchmark.json without what was measured, which is never the same twice."""
    lines = json.loads((folder / "benchmark.json").read_text())["lines"]
    for line in lines:
        line["figures"] = {key: figure for key, figure in line["figures"].items() if "auroc" in key}
    return lines


def start(stubs: Path, workspace: Workspace, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", LAUNCH, str(stubs), *COMMAND, "--device", "cpu", "--output", str(folder)]
    environment = {**os.environ, "STUB_PAUSE": "0.2", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, cwd=workspace.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while sum(path.read_text().count("validation") for path in folder.rglob("train_realnet.jsonl")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_table_holds_means_deviations_and_gaps(bench, tmp_path):
    code, out, err = bench("--jobs", "2")
    assert (code, err) == (0, "")
    lines = {line["name"]: line for line in table(tmp_path / "out")}
    assert list(lines) == ["dots", "lines", "mean"]
    best = {name: best_and_last(name)[0] for name in ("dots", "lines")}
    for name in best:
        last = best_and_last(name)[1]
        figures = lines[name]["figures"]
        gaps = [a - b for a, b in zip(best[name], last, strict=True)]
        for key, values in (("test", best[name]), ("no_test", last), ("gap", gaps)):
            figure = figures[f"image_auroc_{key}"]
            assert figure["mean"] == pytest.approx(statistics.mean(values))
            assert figure["deviation"] == pytest.approx(statistics.stdev(values))
            assert figure["count"] == 2
    # The deviation of the mean line is that of the seeds' means.
    means = [statistics.mean([best[name][i] for name in best]) for i in (0, 1)]
    assert lines["mean"]["figures"]["image_auroc_test"]["deviation"] == pytest.approx(statistics.stdev(means))
    assert f"{100 * statistics.mean(means):.2f} ± {100 * statistics.stdev(means):.2f}" in out
    rows = list(csv.DictReader((tmp_path / "out/benchmark.csv").open()))
    assert float(rows[0]["image_auroc_test_mean"]) == lines["dots"]["figures"]["image_auroc_test"]["mean"]
    assert rows[0]["pro_test_mean"] == ""
    assert "threshold" not in ",".join(rows[0])
    page = (tmp_path / "out/benchmark.html").read_text()
    assert page.count("<polyline") == 4
    assert "abababababab" in page
    assert "64x64" in page


def test_finished_cells_are_kept_and_report_only_runs_nothing(bench, tmp_path):
    assert bench("--report-only")[0] == 2
    assert bench()[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    assert len(before) == 4
    first = table(tmp_path / "out")
    for more in ((), ("--report-only",), ("--report-only", "--seeds", "2", "1")):
        assert bench(*more)[0] == 0
        assert table(tmp_path / "out") == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}


def test_a_failed_cell_is_named_and_does_not_end_the_others(bench, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setenv("STUB_FAILS", "dots 1")
        code, _, err = bench()
    assert code == 1
    assert "1 of 4 cells failed" in err
    assert "default/dots, seed 1: exit code 1: the loss is not finite; see " in err
    assert str(tmp_path / "out/default/dots/seed_1/log.txt") in err
    lines = {line["name"]: line for line in table(tmp_path / "out")}
    assert lines["dots"]["figures"]["image_auroc_test"]["count"] == 1
    # The mean leaves out the seed that lacks a class.
    assert lines["mean"]["seeds"] == [2]
    assert "missing: default/dots, seed 1" in (tmp_path / "out/benchmark.md").read_text()
    assert bench()[0] == 0
    assert {line["name"]: line["seeds"] for line in table(tmp_path / "out")}["mean"] == [1, 2]


def test_changed_settings_are_refused_until_overwritten(bench, tmp_path):
    assert bench("--seeds", "1")[0] == 0
    change = ["--seeds", "1", "--set", "trainer.max_epoch=7"]
    code, _, err = bench(*change)
    assert code == 2
    assert "made with other settings (settings.trainer.max_epoch: 6 -> 7), as 2 of 2 cells" in err
    assert bench(*change, "--report-only")[0] == 2
    assert bench(*change, "--overwrite")[0] == 0
    expected = max(value_at("dots", 1, step + 1) for step in range(7))
    assert table(tmp_path / "out")[0]["figures"]["image_auroc_test"]["mean"] == expected


def test_variants_stand_beside_each_other(bench, tmp_path):
    assert bench("--seeds", "1", "--variant", "base:", "--variant", "long:trainer.max_epoch=9")[0] == 0
    lines = {(line["variant"], line["name"]): line for line in table(tmp_path / "out")}
    assert len(lines) == 6
    for variant, steps in (("base", 6), ("long", 9)):
        figure = lines[variant, "dots"]["figures"]["image_auroc_no_test"]
        assert figure == {"mean": value_at("dots", 1, steps), "deviation": None, "count": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
def test_a_killed_benchmark_goes_on_to_the_same_table(number, bench, stubs, workspace, tmp_path):
    killed = tmp_path / "killed"
    process = start(stubs, workspace, killed)
    wait_for_steps(killed, random.randint(1, STEPS + 3), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)  # also waits for children, which hold no end of these pipes
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, err
        assert "the same command goes on" in out
        assert alive(killed) == []
    # After SIGKILL, a training may still run in its locked folder: the next start waits for it.
    assert bench("--output", str(killed))[0] == 0
    figures = {line["name"]: line["figures"] for line in table(killed)}
    for name in ("dots", "lines"):
        best, last = best_and_last(name)
        assert figures[name]["image_auroc_test"]["mean"] == pytest.approx(statistics.mean(best))
        assert figures[name]["image_auroc_no_test"]["mean"] == pytest.approx(statistics.mean(last))
    lines = [json.loads(line) for line in (killed / "default/dots/seed_1/log/dots/train_realnet.jsonl").open()]
    assert [line["step"] for line in lines if "validation" in line] == list(range(1, STEPS + 1))


def alive(folder: Path) -> list[str]:
    """The command lines of processes that name a folder."""
    listing = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if f"{folder}/" in line]


def test_one_real_cell(workspace, tmp_path, monkeypatch, capsys):
    def start_quickly(command: list[str], env: dict[str, str], **streams: object) -> Process:
        assert command[0] == sys.executable
        return Process(command[1:], workspace.root, env)

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=start_quickly, DEVNULL=None, STDOUT=None))
    command = ["--dataset", "tiny", "--class_name", "dots", "--seeds", "1", "--device", "cpu"]
    command += ["--output", str(tmp_path / "out")]
    code, out, err = run(benchmark.main, command, workspace.root, monkeypatch, capsys)
    assert code == 0, err
    assert "ckpt_last.pth.tar (the last of the training)" in out
    result = json.loads((tmp_path / "out/default/dots/seed_1/result.json").read_text())
    image, pixel = (result["validation"][f"{name}_auroc"] for name in ("image", "pixel"))
    assert [step for step, _ in image] == [2, 4]
    best = max((a + b) / 2 for (_, a), (_, b) in zip(image, pixel, strict=True))
    row = result["metrics"]["test"]["dots"]
    # The pixel metrics of validations and evaluations are the same figures.
    assert (row["image_auroc"] + row["pixel_auroc"]) / 2 == pytest.approx(best)
    assert result["cost"]["training_seconds"] > 0
    assert result["cost"]["weights_sha256"] is None
    assert result["cost"]["ms_per_image_16"] > 0
    assert result["settings"]["random_seed"] == 1


def test_variants_are_cut_at_commas_outside_values():
    text = "small:dataset.input_size=[64, 64],trainer.optimizer.kwargs={lr: 1e-3, betas: [0.9, 0.9]},a='x,y'"
    name, settings = parse_variant(text)
    assert name == "small"
    assert settings == [
        "dataset.input_size=[64, 64]", "trainer.optimizer.kwargs={lr: 1e-3, betas: [0.9, 0.9]}", "a='x,y'"
    ]  # fmt: skip
    for wrong in ("small", "../x:a=1", ":a=1"):
        with pytest.raises(UsageError, match="--variant"):
            parse_variant(wrong)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--set", "random_seed=3"], "name the seeds with --seeds"),
        (["--variant", "a:saver.log_dir=x"], "with --output"),
        (["--seeds", "1", "1"], "names a seed twice"),
        (["--jobs", "0"], "has to be at least 1"),
        (["--variant", "a:trainer.max_epcoh=3"], "did you mean trainer.max_epoch?"),
        (["--class_name", "knots"], "known are dots, lines"),
        (["--variant", "a:", "--variant", "a:"], "given twice"),
    ],
)
def test_wrong_use_is_refused_before_anything_runs(more, says, bench, tmp_path):
    code, _, err = bench(*more)
    assert code == 2
    assert says in err
    assert not (tmp_path / "out").exists()


def test_a_class_without_good_or_defective_test_images_is_refused_before_anything_runs(bench, workspace, tmp_path):
    lists = workspace.root / "data/tiny/samples"
    lines = (lists / "test_dots.json").read_text().splitlines(keepends=True)
    for name, kept in (("good", [line for line in lines if '"label": 0' in line]), ("none", [])):
        (lists / f"train_{name}.json").write_text((lists / "train_dots.json").read_text())
        (lists / f"test_{name}.json").write_text("".join(kept))
    try:
        for name, lacking in (("good", "defective"), ("none", "good and defective")):
            code, _, err = bench("--class_name", name)
            assert code == 2
            assert f"test_{name}.json: holds no {lacking} image; a benchmark measures on good and defective ones" in err
    finally:
        for name in ("good", "none"):
            (lists / f"train_{name}.json").unlink()
            (lists / f"test_{name}.json").unlink()
    assert not (tmp_path / "out").exists()


def test_a_model_for_all_classes_gives_a_line_per_class():
    row = {"image_auroc": 0.9}
    cost = {"backbone": "resnet18", "weights_sha256": None, "input_size": [64, 64], "device": "cpu", "threads": 1}
    cell = {"variant": "default", "class": "uni", "seed": 1, "commit": None, "cost": cost, "validation": {}}
    cell |= {"checkpoints": {"test": "ckpt_best.pth.tar", "no_test": "ckpt_last.pth.tar"}}
    cell |= {"metrics": {choice: {"dots": row, "lines": {"image_auroc": 0.8}} for choice in ("test", "no_test")}}
    lines = Benchmark("title", [cell], [], {}).lines()
    assert [line.name for line in lines] == ["dots", "lines", "mean"]
    assert lines[-1].figures["image_auroc_test"] == Figure(pytest.approx(0.85), None, 1)
