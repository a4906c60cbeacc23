"""Numbers for drawn images: `sample.py --quality`, and the KID of diffusion validations."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train_diffusion
from evaluation.quality import set_up_quality
from evaluation.quality_rows import COLUMNS
from models.sdas import create_diffusion_unet
from models.sdas.sampler import Sampler, set_up_sampler
from models.sdas.trained import load_networks
from tests.conftest import CLASSES, UNET, Workspace, make_data, settings, two_ranks
from tests.in_process import run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import load_config
from utils.distributed import Run
from utils.optim import Stepper
from utils.signals import StopRequest

STRENGTHS = [f"s = {s:g}" for s in sample.PREVIEW_STRENGTHS]
RESULTS = "experiments/tiny/sample_vis/quality/quality.json"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with 13 training images of a class, and a diffusion model that draws something like noise."""
    workspace = Workspace(tmp_path_factory.mktemp("quality"))
    make_data(workspace.data, train=13)
    realnet = settings("data/tiny", "experiments/tiny")["realnet"]
    realnet["dataset"]["input_size"] = [32, 32]
    realnet["structure"][0]["layers"].pop()
    workspace.write_settings("realnet", realnet)
    torch.manual_seed(0)
    network = create_diffusion_unet(**UNET)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    content = {"arch": UNET, "classes": list(CLASSES), "input_size": [16, 16], "state_dict": network.state_dict()}
    save_checkpoint(workspace.out / "diffusion_checkpoints/ckpt_1.pth.tar", content)
    return workspace


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, workspace, *options) runs a command on the CPU and returns its output, or its error."""

    def run_it(main, workspace: Workspace, *options: str, code: int = 0) -> str:
        common = ["--dataset", "tiny", "--device", "cpu", *options]
        found, out, err = run(main, common, workspace.root, monkeypatch, capsys)
        assert found == code, err
        return out if code == 0 else err

    return run_it


QUALITY = ("--no-classifier", "--steps", "2", "--set", "dataset.batch_size=28", "--quality", "--quality-images", "8")


def rows_in(workspace: Workspace) -> dict:
    return json.loads((workspace.root / RESULTS).read_text())["classes"]


def test_quality_is_measured_beside_real_images_and_noise_and_only_once(untrained, call):
    out = call(sample.main, untrained, *QUALITY, "--class_name", "dots")
    (rows,) = rows_in(untrained).values()
    assert list(rows) == ["real", *STRENGTHS, "noise"]
    assert all(set(row) == set(COLUMNS) and np.isfinite(list(row.values())).all() for row in rows.values())
    assert abs(rows["real"]["kid"]) < 2 * rows["real"]["kid_error"] < rows["noise"]["kid"]
    assert rows["noise"]["nearest"] > 2 * rows["real"]["nearest"]
    assert len({rows[name]["kid"] for name in STRENGTHS}) == len(STRENGTHS)
    assert f"{rows['real']['nearest']:.3f}" in out
    folder = (untrained.root / RESULTS).parent
    lines = (folder / "quality.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[1].split(",")[:3] == ["dots", "real", repr(rows["real"]["kid"])]
    page = (folder / "quality.html").read_text()
    assert page.count("<svg") == 5
    assert page.count("<polyline") == 12  # with two of the error, and three of real images

    # The other class joins it; what is there is not measured again, unless that is asked for or the numbers change.
    out = call(sample.main, untrained, *QUALITY)
    assert "dots (measured before" in out
    assert "lines (measured before" not in out
    assert rows_in(untrained)["dots"] == rows
    assert "measured before" not in call(sample.main, untrained, *QUALITY, "--class_name", "dots", "--overwrite")
    assert set(rows_in(untrained)) == set(CLASSES)
    assert rows_in(untrained)["dots"] == rows
    call(sample.main, untrained, *QUALITY, "--class_name", "dots", "--seed", "7")
    assert list(rows_in(untrained)) == ["dots"]
    assert rows_in(untrained)["dots"] != rows


def measured(run, root: str) -> dict[str, dict[str, float]]:
    os.chdir(root)
    config = load_config("experiments/tiny/sample.yaml", script="sample")
    config.classifier, config.TestSampler.section_counts = None, "ddim2"
    sampler = set_up_sampler(config, run, load_networks(config))
    quality = set_up_quality(sampler, run, config, Path("experiments/tiny"), (0.0, 0.2), 8)
    return quality.measure("dots", 0, StopRequest(run))


def measure_in_rank(run, root: str, expected: dict[str, dict[str, float]]) -> None:
    rows = measured(run, root)
    assert bool(rows) == run.is_main
    for name, row in rows.items():
        assert row == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def test_two_ranks_measure_what_one_does(untrained, monkeypatch):
    monkeypatch.chdir(untrained.root)  # and back, after the measurement
    alone = measured(Run(0, 1, torch.device("cpu")), str(untrained.root))
    assert list(alone) == ["real", "s = 0", "s = 0.2", "noise"]
    two_ranks(measure_in_rank, str(untrained.root), alone)


def test_quality_says_what_it_lacks(untrained, call, offline):
    def refused(*options: str, code: int = 2) -> str:
        return call(sample.main, untrained, *QUALITY[:-1], *options, code=code)

    assert "--quality-images 3: at least 8" in refused("3")
    missing = refused("8", "--set", "features.backbone=squeezenet1_1", code=1)
    assert "squeezenet1_1-b8a52dc0.pth is missing" in missing
    assert "name its layers in features.layers" in refused("8", "--set", "features.backbone=vgg11")
    path = untrained.out / "realnet.yaml"
    path.rename(path.with_suffix(".away"))
    try:
        assert "--set features.backbone=" in refused("8")
    finally:
        path.with_suffix(".away").rename(path)


# ---- validations -----------------------------------------------------------------------------------------------------


KID = (
    "--set", "trainer.val_kid_images=8", "--set", "features.backbone=squeezenet1_1",
    "--set", "features.input_size=[32, 32]",
)  # fmt: skip


def train(call, workspace: Workspace, name: str, *options: str, code: int = 0) -> tuple[str, dict, list[dict]]:
    """Train a diffusion model; returns the output, the last checkpoint, and the validations in the log."""
    folders = {"checkpoints_dir": "checkpoints", "log_dir": "log", "vis_dir": "vis"}
    elsewhere = [part for key, value in folders.items() for part in ("--set", f"saver.{key}={name}/{value}")]
    return call(train_diffusion.main, workspace, *elsewhere, *options, code=code), *state_of(workspace, name)


def state_of(workspace: Workspace, name: str) -> tuple[dict, list[dict]]:
    """The last checkpoint of a training, and the validations in its log."""
    path = workspace.out / name / "log/train_diffusion.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    checkpoint = load_checkpoint(workspace.out / name / "checkpoints/ckpt_last.pth.tar")
    return checkpoint, [line for line in lines if "validation" in line]


def same(first: object, second: object) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return torch.equal(first, second) if torch.is_tensor(first) else first == second


def test_validations_measure_kid_and_leave_the_training_as_it_is(workspace, call):
    _, plain, nothing = train(call, workspace, "plain")
    assert nothing == []
    out, trained, lines = train(call, workspace, "measured", *KID, "--set", "features.weights=random")
    assert same({**plain, "run": None}, {**trained, "run": None})
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 2), (2, 4)]
    for line in lines:
        values = line["validation"]
        assert list(values) == [f"kid_s{s:g}{end}" for s in train_diffusion.STRENGTHS for end in ("", "_error")]
        assert f"KID {values['kid_s0']:.3f} +- {values['kid_s0_error']:.3f} at s = 0" in out
    assert "(4 images of each class)" in out


@pytest.mark.parametrize("when", ["measuring", "training after it"])
def test_a_training_that_measures_kid_resumes_bit_for_bit(when, workspace, call, monkeypatch):
    options = [*KID, "--set", "features.weights=random", "--set", "trainer.save_freq_step=1"]
    if not (workspace.out / "whole").exists():
        train(call, workspace, "whole", *options)
    whole, lines = state_of(workspace, "whole")
    owner, name, number = (Sampler, "sample", 3) if when == "measuring" else (Stepper, "step", 3)
    original, calls = getattr(owner, name), []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, signalled)
        _, stopped, _ = train(call, workspace, f"stopped {when}", *options, code=128 + signal.SIGTERM)
    assert stopped["position"]["step"] == {"measuring": 2, "training after it": 3}[when]
    _, resumed, again = train(call, workspace, f"stopped {when}", *options, "--resume")
    assert same({**whole, "run": None}, {**resumed, "run": None})
    assert again == lines  # a measurement that was stopped is made again


def test_validations_of_a_model_of_grey_images_draw_grey_ones(workspace, call, monkeypatch):
    drawn, draw = [], Sampler.draw

    def sample_red(self, number, strengths, generators, *options):
        return torch.tensor([1.0, -1, -1])[:, None, None].expand(len(generators), 3, *self.size)

    monkeypatch.setattr(Sampler, "sample", sample_red)
    monkeypatch.setattr(Sampler, "draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    options = ["dataset.image_reader.kwargs.color_mode=GRAY", "features.weights=random", "trainer.max_epoch=1"]
    train(call, workspace, "grey", *KID, *(part for value in options for part in ("--set", value)))
    assert {tuple(np.unique(images)) for images in drawn} == {(85,)}


def test_validations_of_a_model_of_crops_draw_crops(workspace, call, monkeypatch):
    sizes = set()

    def sample_black(self, number, strengths, generators, *options):
        sizes.add(self.size)
        return torch.zeros(len(generators), 3, *self.size)

    monkeypatch.setattr(Sampler, "sample", sample_black)
    crops = ["dataset.input_size=[32, 48]", "dataset.crop=[16, 32]", "features.weights=random", "trainer.max_epoch=1"]
    train(call, workspace, "crops", *KID, *(part for value in crops for part in ("--set", value)))
    assert sizes == {(16, 32)}


def test_without_a_network_validations_say_once_that_kid_is_not_measured(workspace, call, offline):
    out, _, lines = train(call, workspace, "skipped", *KID, "--set", "trainer.max_epoch=1")
    assert out.count("KID") == 1
    assert "pretrain/squeezenet1_1-b8a52dc0.pth, the weights of squeezenet1_1, is missing" in out
    assert lines == []


def test_a_model_that_draws_infinite_values_is_reported_and_the_training_goes_on(workspace, call, monkeypatch):
    def sample_nothing(self, number, strengths, generators, *options):
        return torch.full((len(generators), 3, *self.size), torch.nan)

    monkeypatch.setattr(Sampler, "sample", sample_nothing)
    options = ["--set", "features.weights=random", "--set", "trainer.max_epoch=1"]
    out, checkpoint, lines = train(call, workspace, "infinite", *KID, *options)
    assert out.count("KID is not measured, as the model draws infinite values") == 1
    assert checkpoint["epoch"] == 1
    assert lines == []
