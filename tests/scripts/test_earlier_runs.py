"""What an earlier run left: checkpoints are not lost or mixed up, thresholds never judge another model."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluation_realnet
import export
import predict
import sample
import train_classifier
import train_diffusion
import train_realnet
import utils.optim
from evaluation import validation
from evaluation.exported import read_program
from tests.conftest import settings
from tests.in_process import run
from utils.checkpoint import load_checkpoint, load_for_resume, refuse_earlier_run, save_checkpoint, save_numbered
from utils.distributed import Run
from utils.errors import Stopped
from utils.lock import folder_lock

ONE_EPOCH = ["--set", "trainer.max_epoch=1"]
DOTS = ["--class_name", "dots"]


def folders(stage: str) -> list[str]:
    names = ("checkpoints", "log", "vis", "results")
    return [part for name in names for part in ("--set", f"saver.{name}_dir={stage}/{name}/")]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(folder: Path) -> dict[Path, bytes]:
    """What run_record.write_record has written in a folder."""
    return {
        path: path.read_bytes() for ending in ("settings.yaml", "runs.jsonl") for path in folder.rglob(f"*.{ending}")
    }


@pytest.fixture
def command(workspace, monkeypatch, capsys):
    """Run a script's main on the tiny data set: (exit code, stdout, stderr)."""

    def call(script, *arguments: str, code: int = 0) -> tuple[str, str]:
        status, out, err = run(script.main, ["--dataset", "tiny", *arguments], workspace.root, monkeypatch, capsys)
        assert status == code, out + err
        return out, err

    return call


@pytest.mark.parametrize(
    ("script", "arguments"), [(train_diffusion, []), (train_classifier, []), (train_realnet, DOTS)],
    ids=["diffusion", "classifier", "realnet"],
)  # fmt: skip
def test_a_new_run_does_not_mix_with_an_earlier_one(script, arguments, command, workspace):
    stage = f"earlier_{script.__name__}"
    command(script, *arguments, *folders(stage), "--set", "trainer.max_epoch=2")
    folder = workspace.out / stage / "checkpoints" / ("dots" if arguments else "")
    before = contents(workspace.out / stage)
    _, err = command(script, *arguments, *folders(stage), *ONE_EPOCH, code=2)
    assert "--resume continues that run, --overwrite deletes its checkpoints" in err
    assert len(err.splitlines()) <= 2
    # Not even its settings or a line of its log.
    assert contents(workspace.out / stage) == before
    (folder / "ckpt_previous.pth.tar.damaged").touch()
    command(script, *arguments, *folders(stage), *ONE_EPOCH, "--overwrite")
    expected = {"ckpt_last.pth.tar", "ckpt_best.pth.tar" if arguments else "ckpt_1.pth.tar"}
    # The diffusion model is saved before its validation and after the last one.
    expected |= {"ckpt_previous.pth.tar"} if script is train_diffusion else set()
    assert {path.name for path in folder.iterdir()} == expected
    assert load_checkpoint(folder / "ckpt_last.pth.tar")["epoch"] == 1
    _, err = command(script, *arguments, "--resume", "--overwrite", code=2)
    assert "not allowed with argument" in err


def test_resuming_a_folder_without_a_newest_checkpoint_is_refused(command, workspace):
    folder = workspace.out / "only_best/checkpoints/dots"
    save_checkpoint(folder / "ckpt_best.pth.tar", {"epoch": 1})
    _, err = command(train_realnet, *DOTS, *folders("only_best"), *ONE_EPOCH, "--resume", code=2)
    assert "ckpt_last.pth.tar to resume; --overwrite deletes" in err
    assert (folder / "ckpt_best.pth.tar").is_file()


def test_an_earlier_run_of_any_class_is_refused_before_the_first_is_trained(command, workspace):
    save_checkpoint(workspace.out / "second/checkpoints/lines/ckpt_best.pth.tar", {"epoch": 1})
    _, err = command(train_realnet, "--class_name", "dots,lines", *folders("second"), *ONE_EPOCH, code=2)
    assert "lines holds the checkpoints of an earlier run" in err
    assert not (workspace.out / "second/checkpoints/dots").exists()
    assert not (workspace.out / "second/log").exists()


def test_a_folder_in_use_is_refused_before_anything_is_logged(command, workspace):
    checkpoints = workspace.out / "in_use/checkpoints/dots"
    with folder_lock(checkpoints, Run(0, 1, torch.device("cpu"))):
        _, err = command(train_realnet, *DOTS, *folders("in_use"), *ONE_EPOCH, code=2)
        assert "writes here" in err
        assert not (workspace.out / "in_use/log").exists()


def test_half_written_checkpoints_are_no_earlier_run(tmp_path):
    (tmp_path / "ckpt_next.pth.tar").touch()
    refuse_earlier_run(tmp_path, resume=False, overwrite=False)
    assert load_for_resume(tmp_path, Run(0, 1, torch.device("cpu")), resume=False) is None
    assert not list(tmp_path.iterdir())


def test_what_was_just_written_is_never_pruned(tmp_path):
    for epoch in (100, 200, 3):
        save_numbered(tmp_path, {"epoch": epoch}, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt_200.pth.tar", "ckpt_3.pth.tar"}


# ---- thresholds ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(workspace):
    """A trained and evaluated class in folders of its own."""
    workspace.run("train_realnet.py", *DOTS, *folders("judged"))
    workspace.run("evaluation_realnet.py", *DOTS, *folders("judged"))
    return workspace


def verdicts(evaluated, monkeypatch, capsys, checkpoint, output) -> tuple[set, str]:
    arguments = ["--checkpoint", str(checkpoint), "--input", "data/tiny/images/dots/test", "--output", str(output)]
    code, out, err = run(predict.main, [*arguments, "--no-pictures"], evaluated.root, monkeypatch, capsys)
    assert code == 0, err
    lines = (output / "scores.jsonl").read_text().splitlines()
    return {json.loads(line)["verdict"] for line in lines}, out


def test_thresholds_go_with_the_checkpoint_that_they_were_chosen_for(evaluated, command, tmp_path, monkeypatch, capsys):
    folder = evaluated.out / "judged/checkpoints/dots"
    assert verdicts(evaluated, monkeypatch, capsys, folder, tmp_path / "a")[0] <= {"normal", "anomalous"}
    # Retrained: the old thresholds are gone.
    command(train_realnet, *DOTS, *folders("judged"), "--overwrite", "--set", "random_seed=5")
    assert not (folder / "ckpt_best.thresholds.json").exists()
    assert verdicts(evaluated, monkeypatch, capsys, folder, tmp_path / "b")[0] == {None}
    command(evaluation_realnet, *DOTS, *folders("judged"), "--no-pictures")
    assert None not in verdicts(evaluated, monkeypatch, capsys, folder, tmp_path / "c")[0]


def test_thresholds_of_other_weights_or_preprocessing_are_not_used(evaluated, tmp_path, monkeypatch, capsys):
    source = evaluated.out / "judged/checkpoints/dots"
    content = load_checkpoint(source / "ckpt_best.pth.tar")
    sidecar = (source / "ckpt_best.thresholds.json").read_text()

    def changed(name: str, change) -> tuple[set, str]:
        copy = {
            **content,
            "state_dict": dict(content["state_dict"]),
            "config": json.loads(json.dumps(content["config"])),
        }
        change(copy)
        save_checkpoint(tmp_path / name / "ckpt_best.pth.tar", copy)
        (tmp_path / name / "ckpt_best.thresholds.json").write_text(sidecar)
        return verdicts(evaluated, monkeypatch, capsys, tmp_path / name, tmp_path / name / "out")

    def other_weight(copy: dict) -> None:
        copy["state_dict"]["rrs.decoder1.1.bias"] = copy["state_dict"]["rrs.decoder1.1.bias"] + 1e-6

    def other_mean(copy: dict) -> None:
        copy["config"]["dataset"]["pixel_mean"] = [0.5, 0.5, 0.5]

    assert None not in changed("same", lambda copy: None)[0]
    for name, change in (("weights", other_weight), ("mean", other_mean)):
        found, out = changed(name, change)
        assert found == {None}, name
        assert "ckpt_best.thresholds.json was written for other weights or another preprocessing and is not used" in out


def test_exports_carry_matching_thresholds_only(evaluated, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "dots"
    folder.mkdir()
    for path in (evaluated.out / "judged/checkpoints/dots").glob("ckpt_best*"):
        (folder / path.name).write_bytes(path.read_bytes())
    sidecar = folder / "ckpt_best.thresholds.json"
    for fits in (True, False):
        if not fits:
            sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "fingerprint": "other"}))
        arguments = ["--checkpoint", str(folder), "--output", str(tmp_path / str(fits)), "--format", "torch"]
        code, _, err = run(export.main, arguments, evaluated.root, monkeypatch, capsys)
        assert code == 0, err
        metadata = read_program(tmp_path / str(fits) / "model.pt2")[1]  # the same in a model.onnx
        assert (json.loads(metadata["thresholds"]) is not None) == fits


def test_another_evaluation_does_not_replace_a_models_own_thresholds(evaluated, command):
    folder = evaluated.out / "judged/checkpoints/dots"
    sidecar = folder / "ckpt_best.thresholds.json"
    before = sidecar.read_text()
    assert json.loads(before)["chosen_on"].endswith("test_dots.json")
    elsewhere = ["--class_name", "lines", "--checkpoint", str(folder / "ckpt_best.pth.tar"), "--no-pictures"]
    out, _ = command(evaluation_realnet, *elsewhere, *folders("judged_elsewhere"))
    assert "was chosen on" in out
    assert "is kept; delete it to have the thresholds of" in out
    assert sidecar.read_text() == before
    # Its own list again, or no thresholds yet: they are written.
    own = [*DOTS, "--checkpoint", str(folder / "ckpt_best.pth.tar"), "--no-pictures", "--target-fpr", "0.1"]
    command(evaluation_realnet, *own, *folders("judged"))
    assert sidecar.read_text() != before
    sidecar.unlink()
    command(evaluation_realnet, *elsewhere, *folders("judged_elsewhere"))
    assert json.loads(sidecar.read_text())["chosen_on"].endswith("test_lines.json")
    sidecar.write_text(before)


# ---- settings come from the checkpoint -------------------------------------------------------------------------------


def test_evaluation_takes_the_settings_of_the_checkpoint(evaluated, command):
    plain, _ = command(evaluation_realnet, *DOTS, *folders("judged"), "--no-pictures")
    other = ["dataset.input_size=[32, 48]", "dataset.pixel_mean=[0.1, 0.2, 0.3]", "net.rrs.kwargs.mode_numbers=[4, 4]"]
    other += ["dataset.image_reader.kwargs.color_mode=GRAY"]
    overrides = [part for setting in other for part in ("--set", setting)]
    out, _ = command(evaluation_realnet, *DOTS, *folders("judged"), "--no-pictures", *overrides)
    row = next(line for line in plain.splitlines() if line.startswith("dots "))
    assert row in out.splitlines()
    for key in (
        "dataset.input_size: [64, 64] (in the YAML: [32, 48])",
        "dataset.pixel_mean",
        "net",
        "color_mode: 'RGB'",
    ):
        assert f"uses the checkpoint's {key}" in out or key in out, key
    assert "uses the checkpoint's" not in plain


def test_sampling_takes_the_networks_of_the_checkpoints(command, workspace):
    command(train_diffusion, *folders("sampled"), *ONE_EPOCH)
    command(train_classifier, *folders("sampled_classifier"), *ONE_EPOCH)
    config = settings("data/tiny", "experiments/tiny")["sample"]
    config["unet"] = {"pertrain_path": "experiments/tiny/sampled/checkpoints/"}
    config["classifier"] = {"pertrain_path": "experiments/tiny/sampled_classifier/checkpoints/"}
    config |= {"sample_number": 1, "workspace": {"root": "data/tiny/short_yaml"}}
    command(sample, "--config", str(workspace.write_settings("short_sample", config)))
    assert (workspace.data / "short_yaml/lines/rank0_0.jpg").is_file()


def test_sampling_takes_process_and_size_of_the_checkpoint_and_says_what_differs(command, workspace):
    if not (workspace.out / "sampled").exists():
        command(train_diffusion, *folders("sampled"), *ONE_EPOCH)
    config = settings("data/tiny", "experiments/tiny")["sample"]
    counts = config["TestSampler"]["section_counts"]
    config["unet"] = {"pertrain_path": "experiments/tiny/sampled/checkpoints/", "classifier_width": 64}
    config["dataset"] = {"batch_size": 4}
    config["TestSampler"] = {"T": 500, "section_counts": counts, "beta_scheduler": "cosine"}
    config |= {"sample_number": 1, "workspace": {"root": "data/tiny/other_yaml"}, "classifier": None}
    out, _ = command(sample, "--config", str(workspace.write_settings("other_sample", config)))
    assert "uses the checkpoint's unet.classifier_width: 32 (in the YAML: 64)" in out
    assert "uses the checkpoint's TestSampler.T: 1000 (in the YAML: 500)" in out
    assert "uses the checkpoint's TestSampler.beta_scheduler: linear (in the YAML: cosine)" in out
    with Image.open(workspace.data / "other_yaml/lines/rank0_0.jpg") as image:
        assert image.size == (16, 16)
    config["dataset"] |= {"H": 32, "W": 16}
    out, _ = command(sample, "--config", str(workspace.write_settings("other_sample", config)), "--overwrite")
    assert "trained on images of [16, 16] (height, width), and draws [32, 16]" in out


@pytest.mark.parametrize(
    ("classes", "message"),
    [(["a", "lines"], "was trained on the classes a, lines"), (["lines", "dots"], "same image list")],
)
def test_a_classifier_of_other_classes_does_not_guide(classes, message, command, workspace):
    if not (workspace.out / "sampled").exists():
        command(train_diffusion, *folders("sampled"), *ONE_EPOCH)
        command(train_classifier, *folders("sampled_classifier"), *ONE_EPOCH)
    content = load_checkpoint(workspace.out / "sampled_classifier/checkpoints/ckpt_1.pth.tar")
    save_checkpoint(workspace.root / "other_classes.pth.tar", {**content, "classes": classes})
    paths = [
        "unet.pertrain_path=experiments/tiny/sampled/checkpoints/",
        "classifier.pertrain_path=other_classes.pth.tar",
    ]
    arguments = [part for path in paths for part in ("--set", path)]
    _, err = command(sample, *arguments, code=2)
    assert message in err
    assert "--no-classifier" in err


# ---- a resumed run obeys its settings --------------------------------------------------------------------------------


def test_a_resumed_run_has_the_learning_rate_of_its_settings(command, workspace):
    command(train_realnet, *DOTS, *folders("slower"), *ONE_EPOCH)
    lower = ["--set", "trainer.optimizer.kwargs.lr=1e-5", "--set", "trainer.max_epoch=2", "--resume"]
    out, _ = command(train_realnet, *DOTS, *folders("slower"), *lower)
    assert "changed since: trainer.optimizer.kwargs.lr: 0.001 -> 1e-05" in out
    assert "changed since: trainer.max_epoch: 1 -> 2" in out
    content = load_checkpoint(workspace.out / "slower/checkpoints/dots/ckpt_last.pth.tar")
    assert content["stepper"]["optimizer"]["param_groups"][0]["lr"] == 1e-5
    out, _ = command(train_realnet, *DOTS, *folders("slower"), *lower)
    assert "nothing is left to do: 2 epochs (trainer.max_epoch) are done" in out
    assert "changed since" not in out


def test_an_epoch_with_other_batches_begins_anew(command, workspace):
    arguments = [*DOTS, *folders("recut"), *ONE_EPOCH]
    command(train_realnet, *arguments)
    path = workspace.out / "recut/checkpoints/dots/ckpt_last.pth.tar"
    content = load_checkpoint(path)
    save_checkpoint(path, {**content, "position": {"epoch": 0, "step": 1, "step_in_epoch": 1}})
    out, _ = command(train_realnet, *arguments, "--resume", "--set", "dataset.batch_size=2")
    assert "changed since: dataset.batch_size: 4 -> 2" in out
    assert "the epoch has other batches now and begins anew" in out
    # One step before, and the four of the whole epoch.
    assert load_checkpoint(path)["position"] == {"epoch": 1, "step": 5, "step_in_epoch": 0, "validated": 5}


def test_shifted_class_numbers_are_refused(command, workspace):
    command(train_classifier, *folders("shifted"), *ONE_EPOCH)
    path = workspace.out / "shifted/checkpoints/ckpt_last.pth.tar"
    save_checkpoint(path, {**load_checkpoint(path), "classes": ["bolts", "dots"]})
    _, err = command(train_classifier, *folders("shifted"), "--resume", code=2)
    assert "was trained on the classes bolts, dots, and the image list has dots, lines" in err


def resumed_with_fewer_images(split: str, command, workspace) -> str:
    """Train an epoch, resume with an image less in the training or test list; returns what the second run printed."""
    stage = f"fewer_{split}"
    command(train_realnet, *DOTS, *folders(stage), *ONE_EPOCH)
    path = workspace.out / stage / "checkpoints/dots/ckpt_last.pth.tar"
    save_checkpoint(path, {**load_checkpoint(path), "best_metric": 2.0})
    lines = (workspace.data / f"samples/{split}_dots.json").read_text().splitlines()
    (workspace.data / f"samples/fewer_{split}_dots.json").write_text("\n".join(lines[:-1]))
    fewer = f"dataset.{split}.meta_file=data/tiny/samples/fewer_{split}_{{}}.json"
    options = ["--set", fewer, "--set", "trainer.max_epoch=2", "--resume"]
    return command(train_realnet, *DOTS, *folders(stage), *options)[0]


def test_a_changed_image_list_is_said(command, workspace):
    out = resumed_with_fewer_images("train", command, workspace)
    assert "changed since: training list: '8 images" in out
    assert "-> '7 images" in out


def test_a_changed_test_list_is_said_and_its_figures_begin_anew(command, workspace):
    out = resumed_with_fewer_images("test", command, workspace)
    assert "changed since: test list: '8 images" in out
    assert "the best figures so far are of other test images and begin anew" in out
    path = workspace.out / "fewer_test/checkpoints/dots/ckpt_last.pth.tar"
    assert load_checkpoint(path)["best_metric"] <= 1


def test_the_reason_of_a_refused_resume_is_whole_and_short(command, workspace):
    command(train_realnet, *DOTS, *folders("refused"), *ONE_EPOCH)
    other = ["--set", "net.rrs.kwargs.mode_numbers=[4, 4]", "--resume"]
    settings_file = workspace.out / "refused/log/dots/train_realnet.settings.yaml"
    before = settings_file.read_bytes()
    out, err = command(train_realnet, *DOTS, *folders("refused"), *other, code=2)
    assert settings_file.read_bytes() == before
    assert re.search(r"tensors \d+ of another shape \(rrs\.decoder1", err)
    assert len(err.strip().splitlines()) == 1
    assert len(err) < 500
    assert "changed since: net.rrs.kwargs.mode_numbers: [8, 8] -> [4, 4]" in out


# ---- not finite is a failure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments"), [(train_diffusion, []), (train_classifier, []), (train_realnet, DOTS)],
    ids=["diffusion", "classifier", "realnet"],
)  # fmt: skip
def test_a_training_that_ends_in_values_that_are_not_finite_fails(script, arguments, command, monkeypatch):
    monkeypatch.setitem(utils.optim._BOUNDS, "lr", (0, False, math.inf, True))
    stage = f"diverged_{script.__name__}"
    far = ["--set", "trainer.optimizer.kwargs.lr=1e36", "--set", "trainer.max_epoch=2"]
    _, err = command(script, *arguments, *folders(stage), *far, code=1)
    assert "not finite" in err


def test_overwriting_with_a_diverged_model_deletes_nothing(command, workspace, monkeypatch):
    if not (workspace.out / "sampled").exists():
        command(train_diffusion, *folders("sampled"), *ONE_EPOCH)
    content = load_checkpoint(workspace.out / "sampled/checkpoints/ckpt_1.pth.tar")
    nan = {name: torch.full_like(value, torch.nan) for name, value in content["ema_state_dict"].items()}
    save_checkpoint(workspace.root / "nan_unet.pth.tar", {**content, "ema_state_dict": nan})
    folder = workspace.data / "kept_images/dots"
    folder.mkdir(parents=True)
    (folder / "rank0_0.jpg").write_bytes(b"an image")
    arguments = ["unet.pertrain_path=nan_unet.pth.tar", "workspace.root=data/tiny/kept_images"]
    options = [part for argument in arguments for part in ("--set", argument)]
    _, err = command(sample, "--class_name", "dots", "--no-classifier", "--overwrite", *options, code=1)
    assert "not finite" in err
    assert (folder / "rank0_0.jpg").read_bytes() == b"an image"


def test_a_validation_that_a_signal_ended_is_made_up_for(command, workspace, monkeypatch):
    two_epochs = ["--set", "trainer.max_epoch=2"]
    command(train_realnet, *DOTS, *folders("unstopped"), *two_epochs)

    def stopped(*arguments: object, **options: object) -> None:
        raise Stopped(15)

    with monkeypatch.context() as patched:
        patched.setattr(validation, "predict_maps", stopped)
        out, _ = command(train_realnet, *DOTS, *folders("stopped"), *two_epochs, code=143)
        assert "SIGTERM: saved after step 2, in the validation; the same command with --resume continues" in out
    out, _ = command(train_realnet, *DOTS, *folders("stopped"), *two_epochs, "--resume")
    assert "resumed" in out
    assert out.count("image_auroc") == 2
    one, other = (
        load_checkpoint(workspace.out / f"{stage}/checkpoints/dots/ckpt_last.pth.tar")
        for stage in ("unstopped", "stopped")
    )
    assert one["position"] == other["position"]
    assert one["best_metric"] == other["best_metric"]
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])


@pytest.mark.parametrize(
    ("script", "arguments", "weights"),
    [
        (train_diffusion, [], "unet.pertrain_path"),
        (train_classifier, [], "classifier.pertrain_path"),
        (train_realnet, DOTS, "net.backbone.kwargs.weights"),
    ],
    ids=["diffusion", "classifier", "realnet"],
)
def test_overwriting_deletes_nothing_before_the_new_run_can_start(script, arguments, weights, command, workspace):
    stage = f"kept_{script.__name__}"
    command(script, *arguments, *folders(stage), *ONE_EPOCH)
    before = contents(workspace.out / stage / "checkpoints") | records(workspace.out / stage)
    assert len(before) >= 4
    _, err = command(script, *arguments, *folders(stage), "--overwrite", "--set", f"{weights}=gone.pt", code=2)
    assert re.search(r"gone\.pt.* does not exist", err)
    assert contents(workspace.out / stage / "checkpoints") | records(workspace.out / stage) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "unet.pertrain_path=gone.pth.tar"], "gone.pth.tar does not exist"),
        (["--class_name", "bolts"], "the classes of the model are dots, lines"),
        (["--reconstruct", "gone.png", "--class_name", "dots"], "gone.png is not an image file"),
        (["--quality", "--quality-images", "3"], "--quality-images 3: at least 8"),
    ],
    ids=["weights", "class", "image", "quality"],
)
def test_a_sampling_that_cannot_begin_leaves_the_record_of_the_one_before(options, message, command, workspace):
    network = "unet.pertrain_path=experiments/tiny/drawn/checkpoints/"
    draw = ["--no-classifier", "--set", network, "--set", "workspace.root=data/tiny/drawn", *folders("drawn")]
    if not (workspace.out / "drawn").exists():
        command(train_diffusion, *folders("drawn"), *ONE_EPOCH)
        command(sample, *draw)
    before = records(workspace.out / "drawn")
    _, err = command(sample, *draw, *options, code=2)
    assert message in err
    assert records(workspace.out / "drawn") == before


def test_an_evaluation_that_cannot_begin_leaves_the_record_of_the_one_before(command, workspace):
    command(train_realnet, *DOTS, *folders("evaluated"), *ONE_EPOCH)
    command(evaluation_realnet, *DOTS, *folders("evaluated"), "--no-pictures")
    before = records(workspace.out / "evaluated")
    assert len(before) >= 4
    _, err = command(evaluation_realnet, *DOTS, *folders("evaluated"), "--checkpoint", "gone.pth.tar", code=2)
    assert "gone.pth.tar does not exist" in err
    assert records(workspace.out / "evaluated") == before
