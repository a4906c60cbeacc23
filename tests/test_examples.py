"""The scripts in examples/, run with --quick in a folder of their own."""

import csv
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import benchmark
from evaluation import benchmark_cell
from tests import quick_start
from tests.conftest import REPOSITORY
from tests.scripts.benchmark_stubs import write_stubs
from utils import cli

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


def in_quick_process(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess:
    """As subprocess.run, without the time that importing libraries takes."""
    assert command[0] == sys.executable
    done = quick_start.run(command[1:], cwd, {"CUDA_VISIBLE_DEVICES": ""}, seconds=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def example(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[Path, str]]:
    """Runs an example; returns the only folder that it has written to, and what it has printed itself."""

    def call(name: str, start: Callable = in_quick_process) -> tuple[Path, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "run", start)
            runpy.run_path(str(REPOSITORY / "examples" / f"{name}.py"))
        folders = [*tmp_path.iterdir(), *(tmp_path / "examples_output").iterdir()]
        assert folders == [tmp_path / "examples_output", tmp_path / "examples_output" / f"{name}_quick"]
        return folders[-1], capsys.readouterr().out

    return call


def test_own_images_get_verdicts(example):
    folder, out = example("own_images")
    rows = list(csv.DictReader((folder / "results/scores.csv").open()))
    assert [row["file"].partition("_")[2] for row in rows] == [
        "OK.png",
        "OK.png",
        "scratch.png",
        "OK.png",
        "OK.png",
        "stain.png",
    ]
    assert {row["verdict"] for row in rows} <= {"normal", "anomalous"}
    assert (folder / "data/bricks/preview/bricks.png").is_file()
    for row in rows:
        assert re.search(rf"^{row['file']} +{float(row['score']):.3f}  {row['verdict']}$", out, re.MULTILINE)


def test_a_benchmark_is_read_back(example, tmp_path_factory, monkeypatch):
    stubs = write_stubs(tmp_path_factory.mktemp("stubs"))  # in place of the trainings
    monkeypatch.setattr(benchmark, "REPOSITORY", stubs)
    monkeypatch.setattr(benchmark_cell, "REPOSITORY", stubs)
    run_process = subprocess.run

    def start(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess:
        if Path(command[1]).name != "benchmark.py":
            return in_quick_process(command, cwd)
        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "run", run_process)
            patched.chdir(cwd)
            patched.setattr(sys, "argv", [*command[1:], "--device", "cpu"])
            cli.run(benchmark.main)
        return subprocess.CompletedProcess(command, 0)

    folder, out = example("benchmark_mvtec", start)
    lines = json.loads((folder / "experiments/two/benchmark/benchmark.json").read_text())["lines"]
    assert [(line["name"], line["seeds"]) for line in lines] == [
        (name, [100, 101]) for name in ("brick", "gravel", "mean")
    ]
    for line in lines:
        figure = line["figures"]["image_auroc_gap"]
        assert f"{line['name']:8} image AUROC, gap      {figure['mean']:.4f} ± {figure['deviation']:.4f}" in out


def test_a_diffusion_model_makes_pairs(example):
    folder, out = example("synthesis")
    assert (folder / "experiments/grass/sample_vis/grass.png").is_file()
    assert len(list((folder / "data/grass/sdas/grass").glob("*.jpg"))) == 4
    for kind in ("pairs", "edits"):
        rows = list(csv.DictReader((folder / kind / "grass/pairs.csv").open()))
        assert len(rows) == 4
        for row in rows:
            assert all((folder / kind / "grass" / row[key]).is_file() for key in ("image", "mask"))
        assert f"{folder / kind / 'grass'}: 4 pairs" in out


def test_a_detector_scores_images_and_tiles(example):
    folder, out = example("deployment")
    thresholds = [float(value) for value in re.findall(r"false alarms: threshold (\S+),", out)]
    assert len(thresholds) == 4
    assert thresholds == sorted(thresholds)
    scores = [json.loads(line) for line in (folder / "results/scores.jsonl").open()]
    assert [line["file"] for line in scores] == ["good.png", "hole.png"]
    for line in scores:
        assert f"tiles  {line['file']:9} score {line['score']:.4f}  {line['verdict']}" in out
    assert len(re.findall(r"^whole  \S+ +score", out, re.MULTILINE)) == 2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_notebooks_that_the_page_names(path):
    cells = re.split(r"^# %%.*\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert cells[0] == ""
    assert len(cells) > 10
    assert f"python examples/{path.name}" in (REPOSITORY / "examples/README.md").read_text(encoding="utf-8")
