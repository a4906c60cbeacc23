"""A small data set on disk, settings for it, and the commands run as a user runs them."""

import copy
import os
import pickle
import subprocess
import sys
import tempfile
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from datasets.lists import UNIFIED, Sample, write_list
from tests import quick_start

REPOSITORY = Path(__file__).resolve().parent.parent
CLASSES = ("dots", "lines")
SIDE = 64


def texture(name: str, rng: np.random.Generator) -> np.ndarray:
    """A generated image of a class, (SIDE, SIDE, 3) uint8."""
    image = rng.normal(110, 6, (SIDE, SIDE))
    if name == "lines":
        image[:: int(rng.integers(6, 9))] += 60
    else:
        for y, x in rng.integers(4, SIDE - 4, (12, 2)):
            image[y - 2 : y + 2, x - 2 : x + 2] += 60
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def make_data(root: Path, train: int = 8, good: int = 4, bad: int = 4) -> None:
    """Write images under root/images and lists under root/samples, in MVTec-AD's layout."""
    rng = np.random.default_rng(0)
    lists: dict[str, list[Sample]] = {"train": [], "test": []}
    for name in CLASSES:
        class_lists: dict[str, list[Sample]] = {"train": [], "test": []}
        for split, count in (("train", train), ("test", good)):
            for i in range(count):
                filename = f"{name}/{split}/good/{i:03d}.png"
                write_png(root / "images" / filename, texture(name, rng))
                class_lists[split].append(Sample(filename, 0, name))
        for i in range(bad):
            image, mask = texture(name, rng), np.zeros((SIDE, SIDE), np.uint8)
            y, x = rng.integers(4, SIDE - 20, 2)
            image[y : y + 16, x : x + 16] = rng.integers(0, 255, 3)
            mask[y : y + 16, x : x + 16] = 255
            filename, maskname = f"{name}/test/spot/{i:03d}.png", f"{name}/ground_truth/spot/{i:03d}_mask.png"
            write_png(root / "images" / filename, image)
            write_png(root / "images" / maskname, mask)
            class_lists["test"].append(Sample(filename, 1, name, maskname))
        for split, samples in class_lists.items():
            write_list(root / "samples" / f"{split}_{name}.json", samples)
            lists[split] += samples
    for split, samples in lists.items():
        write_list(root / "samples" / f"{split}_{UNIFIED}.json", samples)


def write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


UNET = {
    "classifier_width": 32,
    "classifier_depth": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "class_number": 2,
    "num_head_channels": 32,
    "pertrain_path": None,
}
CLASSIFIER = {
    "classifier_width": 32,
    "classifier_depth": 1,
    "channel_mult": [1, 2],
    "classifier_attention_resolutions": [2],
    "class_number": 2,
    "num_head_channels": 32,
    "pertrain_path": None,
}
SAMPLERS = {"TrainSampler": {"T": 1000}, "TestSampler": {"T": 1000, "section_counts": "ddim4"}}
ADAM = {"type": "Adam", "kwargs": {"lr": 1e-3}}


def reader(data: str) -> dict:
    return {"type": "opencv", "kwargs": {"image_dir": f"{data}/images", "color_mode": "RGB"}}


def settings(data: str, out: str) -> dict[str, dict]:
    """Settings of all scripts, by file name."""
    sdas_data = {
        "image_reader": reader(data),
        "train": {"meta_file": f"{data}/samples/train_uni.json"},
        "test": {"meta_file": f"{data}/samples/test_uni.json"},
        "input_size": [16, 16],
        "batch_size": 4,
        "workers": 0,
    }
    return {
        "diffusion": {
            "dataset": sdas_data,
            "unet": UNET,
            "trainer": {
                "max_epoch": 2,
                "val_freq_epoch": 1,
                "val_batch_number": 1,
                "val_kid_images": 0,
                "accumulate": 3,
                "optimizer": ADAM,
            },
            **SAMPLERS,
        },
        "classifier": {
            "dataset": sdas_data,
            "classifier": CLASSIFIER,
            "trainer": {"max_epoch": 2, "val_freq_epoch": 1, "save_freq_epoch": 1, "optimizer": ADAM},
        },
        "sample": {
            "dataset": {"batch_size": 3, "H": 16, "W": 16},
            "sample_number": 5,
            "unet": {**UNET, "pertrain_path": f"{out}/diffusion_checkpoints/"},
            "classifier": {**CLASSIFIER, "pertrain_path": f"{out}/classifier_checkpoints/"},
            "TestSampler": SAMPLERS["TestSampler"],
            "workspace": {"root": f"{data}/sdas"},
        },
        "realnet": {
            "dataset": {
                "type": "tiny",
                "image_reader": reader(data),
                "train": {
                    "meta_file": f"{data}/samples/train_{{}}.json",
                    "dtd_dir": f"{data}/images/lines/train",
                    "sdas_dir": f"{data}/sdas/{{}}",
                    "perlin_scale": 4,
                    "anomaly_types": {"normal": 0.5, "dtd": 0.5},
                },
                "test": {"meta_file": f"{data}/samples/test_{{}}.json"},
                "input_size": [64, 64],
                "batch_size": 4,
                "workers": 0,
            },
            **copy.deepcopy(REALNET),
            "trainer": {"max_epoch": 2, "val_freq_epoch": 1, "print_freq_step": 1, "optimizer": ADAM},
        },
    }


REALNET = {
    # Half of layer1's channels and a quarter of layer2's, so that AFS has a choice.
    "structure": [
        {
            "name": "block1",
            "layers": [{"idx": "layer1", "planes": 32}, {"idx": "layer2", "planes": 32}],
            "stride": 4,
        }
    ],
    "net": [
        {
            "name": "backbone",
            "type": "models.backbones.Backbone",
            "kwargs": {"backbone": "resnet18", "weights": "random"},
        },
        {"name": "afs", "type": "models.afs.AFS", "kwargs": {"init_bsn": 2}},
        {
            "name": "recon",
            "type": "models.recon.ReconstructionLayer",
            "kwargs": {"num_res_blocks": 1, "channel_mult": [1, 2], "attention_mult": [2]},
        },
        {"name": "rrs", "type": "models.rrs.RRS", "kwargs": {"mode_numbers": [8, 8], "num_residual_layers": 1}},
    ],
    "criterion": [
        {"name": "SegmentCrossEntropyLoss", "type": "SegmentCrossEntropyLoss", "kwargs": {"weight": 1.0}},
        {"name": "FeatureMSELoss", "type": "FeatureMSELoss", "kwargs": {"weight": 1.0}},
    ],
}


class Workspace:
    """A folder with the small data set and settings, in which the commands run.

    Args:
        root: the folder; it holds data/tiny and experiments/tiny.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data, self.out = root / "data" / "tiny", root / "experiments" / "tiny"
        make_data(self.data)
        for name, config in settings("data/tiny", "experiments/tiny").items():
            self.write_settings(name, config)

    def write_settings(self, name: str, config: dict) -> Path:
        path = self.out / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config))
        return path

    def run(
        self, script: str, *arguments: str, ranks: int = 1, nodes: int = 1, launcher: Sequence[str] = (), code: int = 0
    ) -> subprocess.CompletedProcess:
        """Run a script with `--dataset tiny` in this folder and check its exit code.

        Args:
            ranks, nodes: run it on so many, without a launcher, which would import the libraries in each process.
            launcher: run it in real processes with this one, e.g. TORCHRUN.
        """
        command = [*launcher, str(REPOSITORY / script), "--dataset", "tiny", *arguments]
        if launcher:
            command, pipes = [sys.executable, *command], {"capture_output": True, "text": True}
            done = subprocess.run(command, cwd=self.root, env=script_environment(), timeout=300, check=False, **pipes)
        else:
            done = quick_start.run(command, self.root, script_environment(), ranks=ranks, nodes=nodes)
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        if code == 2:
            assert "Traceback" not in done.stderr, done.stderr
            assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
        return done

    def start(self, script: str, *arguments: str) -> quick_start.Process:
        """Start a script with `--dataset tiny` in this folder."""
        command = [str(REPOSITORY / script), "--dataset", "tiny", *arguments]
        return quick_start.Process(command, self.root, script_environment())


def script_environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """A folder with images/ and samples/."""
    make_data(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every download fail, whether or not there is a network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def two_ranks(function: Callable, *arguments: object) -> None:
    """Run function(run, *arguments) in two gloo processes; the function must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder, "call")
        call.write_bytes(pickle.dumps((function, arguments)))
        command = [str(REPOSITORY / "tests/in_rank.py"), str(call)]
        done = quick_start.run(command, REPOSITORY, script_environment(), seconds=120, ranks=2)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
