"""The five commands, run as a user runs them: plain, on two ranks and under torch.distributed.launch.

Under torchrun, on one node and on two, they run in test_resume.py and test_nodes.py.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CLASSES, Workspace, settings
from utils.checkpoint import load_checkpoint

# One port per test process, because two of them may launch at the same time.
LAUNCH = ("-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={20000 + os.getpid() % 10000}")


def elsewhere(workspace: Workspace, stage: str) -> list[str]:
    """Settings that send a run's outputs to separate folders."""
    folders = {"checkpoints_dir": "checkpoints", "log_dir": "log", "vis_dir": "vis", "results_dir": "results"}
    return [part for key, name in folders.items() for part in ("--set", f"saver.{key}={stage}/{name}")]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["state_dict"]


def assert_same_weights(first_path: Path, second_path: Path) -> None:
    first, second = weights(first_path), weights(second_path)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- diffusion -------------------------------------------------------------------------------------------------------


def test_diffusion_writes_checkpoints_sheets_and_logs(diffusion):
    content = load_checkpoint(diffusion.out / "diffusion_checkpoints/ckpt_2.pth.tar")
    assert {"epoch", "arch", "state_dict", "loss", "ema_state_dict"} <= set(content)
    assert content["epoch"] == 2
    assert content["classes"] == list(CLASSES)
    last = load_checkpoint(diffusion.out / "diffusion_checkpoints/ckpt_last.pth.tar")
    # 4 batches an epoch, 3 accumulated.
    assert last["position"] == {"epoch": 2, "step": 4, "step_in_epoch": 0, "validated": 4}
    assert "stepper" not in content
    averaged = content["ema_state_dict"]["input_blocks.0.0.weight"]
    assert not torch.equal(averaged, content["state_dict"]["input_blocks.0.0.weight"])
    for name in CLASSES:
        assert (diffusion.out / f"diffusion_vis/epoch_2/{name}.png").is_file()
    log = (diffusion.out / "diffusion_log/train_diffusion.log").read_text()
    assert "reconstruction error" in log
    assert list((diffusion.out / "diffusion_log/train_diffusion").glob("events.*"))


def test_diffusion_is_reproducible_with_any_number_of_workers(diffusion):
    arguments = elsewhere(diffusion, "again")
    diffusion.run("train_diffusion.py", *arguments, "--set", "dataset.workers=2")
    name = "ckpt_2.pth.tar"
    assert_same_weights(diffusion.out / "diffusion_checkpoints" / name, diffusion.out / "again/checkpoints" / name)


def test_diffusion_resumes_and_keeps_the_newest_checkpoints(diffusion):
    arguments = [*elsewhere(diffusion, "resumed"), "--set", "saver.keep=1"]
    diffusion.run("train_diffusion.py", *arguments, "--set", "trainer.max_epoch=1")
    done = diffusion.run("train_diffusion.py", *arguments, "--resume")
    assert "after epoch 1" in done.stdout
    folder = diffusion.out / "resumed/checkpoints"
    names = ["ckpt_2.pth.tar", "ckpt_last.pth.tar", "ckpt_previous.pth.tar"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert_same_weights(diffusion.out / "diffusion_checkpoints/ckpt_2.pth.tar", folder / "ckpt_2.pth.tar")


def test_diffusion_starts_from_a_file_and_logs_what_fitted(diffusion):
    path = diffusion.out / "diffusion_checkpoints/ckpt_2.pth.tar"
    arguments = [*elsewhere(diffusion, "tuned"), "--set", "trainer.max_epoch=1"]
    done = diffusion.run("train_diffusion.py", *arguments, "--set", f"unet.pertrain_path={path}")
    count = len(weights(path))
    assert f"loaded {count} of {count} tensors" in done.stdout
    torch.save({"a": torch.zeros(1)}, diffusion.root / "other.pt")
    failed = diffusion.run(
        "train_diffusion.py",
        *arguments,
        "--overwrite",
        "--set",
        f"unet.pertrain_path={diffusion.root}/other.pt",
        code=2,
    )
    assert "0 of " in failed.stderr
    assert "unet.classifier_width" in failed.stderr


def test_diffusion_under_two_ranks(diffusion):
    diffusion.run("train_diffusion.py", *elsewhere(diffusion, "ranks"), ranks=2)
    assert (diffusion.out / "ranks/checkpoints/ckpt_2.pth.tar").is_file()
    assert {path.stem for path in (diffusion.out / "ranks/vis/epoch_2").iterdir()} == set(CLASSES)
    shutil.rmtree(diffusion.out / "ranks")


# ---- classifier ------------------------------------------------------------------------------------------------------


def test_classifier_reports_accuracy_also_by_timestep(classifier):
    content = load_checkpoint(classifier.out / "classifier_checkpoints/ckpt_2.pth.tar")
    assert {"epoch", "arch", "state_dict", "acc"} <= set(content)
    log = (classifier.out / "classifier_log/train_classifier.log").read_text()
    assert "top-1" in log
    assert "top-3 1.0000" in log  # two classes
    assert len(log.splitlines()[-2].split("to T: ")[1].split()) == 10


def test_classifier_under_two_ranks_counts_every_image_once(classifier):
    done = classifier.run("train_classifier.py", *elsewhere(classifier, "ranks"), ranks=2)
    assert "over 8 images" in done.stdout
    shutil.rmtree(classifier.out / "ranks")


def test_classifier_resumes(classifier):
    arguments = elsewhere(classifier, "resumed_classifier")
    classifier.run("train_classifier.py", *arguments, "--set", "trainer.max_epoch=1")
    classifier.run("train_classifier.py", *arguments, "--resume")
    name = "ckpt_2.pth.tar"
    assert_same_weights(
        classifier.out / "classifier_checkpoints" / name, classifier.out / "resumed_classifier/checkpoints" / name
    )


# ---- RealNet and evaluation ------------------------------------------------------------------------------------------


def test_realnet_writes_checkpoints_and_training_samples(realnet):
    for name in CLASSES:
        content = load_checkpoint(realnet.out / f"realnet_checkpoints/{name}/ckpt_best.pth.tar")
        assert {"epoch", "arch", "state_dict", "best_metric"} <= set(content)
        assert 0 <= content["best_metric"] <= 1
        for layer in ("layer1", "layer2"):
            kept = content["state_dict"][f"afs.indexes.block1_{layer}"]
            assert kept.dtype == torch.int64
            assert len(kept.unique()) == 32
            # AFS has chosen, and not kept the first ones that the network starts with.
            assert not torch.equal(kept, torch.arange(32))
        sheet = np.asarray(Image.open(realnet.out / f"realnet_vis/{name}/training_samples.png"))
        assert sheet.shape[1] == 4 * 64 + 3 * 4
    log = (realnet.out / "realnet_log/dots/train_realnet.log").read_text()
    assert "RANDOM weights" in log
    assert "AFS block1_layer1: kept 32 of 64 channels" in log
    assert "AFS block1_layer2: kept 32 of 128 channels" in log


def test_tensorboard_shows_the_training(realnet):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(realnet.out / "realnet_log/dots/train_realnet")).Reload()
    scalars = {"loss", "SegmentCrossEntropyLoss", "FeatureMSELoss", "learning_rate", "images_per_second"}
    assert {f"train/{name}" for name in scalars} <= set(events.Tags()["scalars"])
    assert {"validation/image_auroc", "validation/pixel_auroc"} <= set(events.Tags()["scalars"])
    assert 50 * 2**20 < events.Scalars("train/peak_memory_GiB")[-1].value * 2**30 < 16 * 2**30
    for layer, channels in (("layer1", 64), ("layer2", 128)):
        assert events.Scalars(f"afs/block1_{layer}_kept")[0].value == 32
        assert events.Histograms(f"afs/block1_{layer}_loss")[0].histogram_value.num == channels
    pictures = EventAccumulator(str(realnet.out / "realnet_log/dots/train_realnet/pictures")).Reload()
    assert set(pictures.Tags()["images"]) == {"train/samples", "validation/heat_maps"}


def test_realnet_is_reproducible_with_any_number_of_workers(realnet):
    arguments = [*elsewhere(realnet, "again"), "--set", "dataset.workers=2"]
    realnet.run("train_realnet.py", "--class_name", "dots", *arguments)
    name = "dots/ckpt_last.pth.tar"
    assert_same_weights(realnet.out / "realnet_checkpoints" / name, realnet.out / "again/checkpoints" / name)


def test_realnet_resumes(realnet):
    arguments = [*elsewhere(realnet, "resumed"), "--class_name", "dots"]
    realnet.run("train_realnet.py", *arguments, "--set", "trainer.max_epoch=1")
    done = realnet.run("train_realnet.py", *arguments, "--resume")
    assert "after epoch 1" in done.stdout
    name = "dots/ckpt_last.pth.tar"
    assert_same_weights(realnet.out / "realnet_checkpoints" / name, realnet.out / "resumed/checkpoints" / name)


def test_realnet_under_torch_distributed_launch(realnet):
    realnet.run("train_realnet.py", "--class_name", "dots", *elsewhere(realnet, "ranks"), launcher=LAUNCH)
    assert (realnet.out / "ranks/checkpoints/dots/ckpt_best.pth.tar").is_file()
    shutil.rmtree(realnet.out / "ranks")


def table_of(stdout: str) -> list[str]:
    lines = stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("class "))
    return lines[start : start + 2 + len(CLASSES)]


def test_evaluation_gives_the_same_results_with_any_number_of_ranks(realnet):
    tables, files = [], []
    for ranks in (1, 2):
        done = realnet.run("evaluation_realnet.py", "--class_name", "all", ranks=ranks)
        tables.append(table_of(done.stdout))
        names = ("metrics.json", "metrics_by_defect.csv", "report.html")
        written = [(realnet.out / "realnet_results" / name).read_text() for name in names]
        written.append((realnet.out / "realnet_checkpoints/dots/ckpt_best.thresholds.json").read_text())
        files.append(written)
        assert "images/s in the forward pass" in done.stdout
    assert tables[0] == tables[1]
    assert files[0] == files[1]
    assert [line.split()[0] for line in tables[0]] == ["class", *CLASSES, "mean"]
    metrics = json.loads(files[0][0])
    assert metrics["mean"]["pixel_auroc"] == pytest.approx(np.mean([metrics[c]["pixel_auroc"] for c in CLASSES]))
    for defect_type, count in (("good", 4), ("spot", 4)):
        images = list((realnet.out / f"realnet_vis/dots/{defect_type}").glob("*.png"))
        assert len(images) == count
        assert np.asarray(Image.open(images[0])).shape[1] == 3 * 128 + 2 * 4  # of 64 pixels, enlarged


def test_checkpoints_of_the_reference_can_be_evaluated(realnet):
    from easydict import EasyDict

    content = load_checkpoint(realnet.out / "realnet_checkpoints/dots/ckpt_best.pth.tar")
    path = realnet.root / "reference.pth.tar"
    state = {f"module.{name}": value for name, value in content["state_dict"].items()}
    arch = EasyDict({"net": content["arch"]})
    torch.save({"epoch": 1, "arch": arch, "state_dict": state, "best_metric": 0.5}, path)
    arguments = ["--class_name", "dots", "--no-pictures"]
    original = realnet.run("evaluation_realnet.py", *arguments)
    converted = realnet.run("evaluation_realnet.py", *arguments, "--checkpoint", str(path))
    assert table_of(original.stdout)[:2] == table_of(converted.stdout)[:2]


def test_evaluation_without_masks_says_so(realnet, tmp_path):
    lines = [json.loads(line) for line in (realnet.data / "samples/test_dots.json").read_text().splitlines()]
    for line in lines:
        line.pop("maskname", None)
    (tmp_path / "test.json").write_text("\n".join(map(json.dumps, lines)))
    config = settings("data/tiny", "experiments/tiny")["realnet"]
    path = realnet.write_settings("no_masks", config)
    (tmp_path / "test_dots.json").write_text((tmp_path / "test.json").read_text())
    arguments = [
        "--config",
        str(path),
        "--class_name",
        "dots",
        "--set",
        f"dataset.test.meta_file={tmp_path}/test_{{}}.json",
    ]
    cells = table_of(realnet.run("evaluation_realnet.py", *arguments).stdout)[1].split()
    assert cells[2:4] == ["n/a", "n/a"]
    assert cells[1] != "n/a"
    done = realnet.run("train_realnet.py", *arguments, *elsewhere(realnet, "no_masks"))
    assert "image_auroc" in done.stdout
    assert "pixel_auroc" not in done.stdout


def test_one_model_for_all_classes(workspace):
    config = settings("data/tiny", "experiments/tiny")["realnet"]
    config["dataset"]["train"]["meta_file"] = "data/tiny/samples/train_uni.json"
    config["dataset"]["test"]["meta_file"] = "data/tiny/samples/test_uni.json"
    config["net"] = [
        {**part, "type": "models.recon.SimpleReconstructionLayer", "kwargs": {}} if part["name"] == "recon" else part
        for part in config["net"]
    ]
    path = str(workspace.write_settings("realnet_unified", config))
    workspace.run("train_realnet.py", "--config", path)
    assert (workspace.out / "realnet_checkpoints/uni/ckpt_best.pth.tar").is_file()
    done = workspace.run("evaluation_realnet.py", "--config", path, "--set", "saver.results_dir=unified/")
    assert [line.split()[0] for line in table_of(done.stdout)] == ["class", *CLASSES, "mean"]
    assert f"Next: python predict.py --checkpoint {workspace.out}/realnet_checkpoints/uni " in done.stdout


def test_demo_data_is_complete(tmp_path):
    from datasets.lists import read_list
    from preparation.demo import CLASSES as DEMO
    from preparation.demo import DEFECTS, SPLIT_COLUMN, make_demo

    make_demo(tmp_path)
    for name in DEMO:
        train = read_list(tmp_path / f"samples/train_{name}.json", tmp_path / "images")
        test = read_list(tmp_path / f"samples/test_{name}.json", tmp_path / "images")
        assert (len(train), len(test)) == (120, 30 + 10 * len(DEFECTS))
        for sample in test:
            if sample.label:
                mask = np.asarray(Image.open(tmp_path / "images" / sample.maskname))
                assert 0.001 < (mask > 0).mean() < 0.2
    assert SPLIT_COLUMN < 512 - 128
