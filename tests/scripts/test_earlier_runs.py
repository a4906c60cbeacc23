"""What an earlier run left: checkpoints are not lost or mixed up, thresholds never judge another model."""

import json
from pathlib import Path

import pytest
import torch

import evaluation_realnet
import export
import predict
import sample
import train_classifier
import train_diffusion
import train_realnet
from tests.conftest import settings
from tests.in_process import run
from utils.checkpoint import load_checkpoint, refuse_earlier_run, save_checkpoint, save_numbered
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


def test_a_folder_in_use_is_refused_before_anything_is_logged(command, workspace):
    checkpoints = workspace.out / "in_use/checkpoints/dots"
    with folder_lock(checkpoints, Run(0, 1, torch.device("cpu"))):
        _, err = command(train_realnet, *DOTS, *folders("in_use"), *ONE_EPOCH, code=2)
        assert "writes here" in err
        assert not (workspace.out / "in_use/log").exists()


def test_half_written_checkpoints_are_no_earlier_run(tmp_path):
    (tmp_path / "ckpt_next.pth.tar").touch()
    refuse_earlier_run(tmp_path, resume=False, overwrite=False)
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
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    folder = tmp_path / "dots"
    folder.mkdir()
    for path in (evaluated.out / "judged/checkpoints/dots").glob("ckpt_best*"):
        (folder / path.name).write_bytes(path.read_bytes())
    sidecar = folder / "ckpt_best.thresholds.json"
    for fits in (True, False):
        if not fits:
            sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "fingerprint": "other"}))
        arguments = ["--checkpoint", str(folder), "--output", str(tmp_path / str(fits)), "--format", "onnx"]
        code, _, err = run(export.main, arguments, evaluated.root, monkeypatch, capsys)
        assert code == 0, err
        stored = {p.key: p.value for p in onnx.load(tmp_path / str(fits) / "model.onnx").metadata_props}
        assert (json.loads(stored["thresholds"]) is not None) == fits


# ---- settings come from the checkpoint -------------------------------------------------------------------------------


def test_evaluation_takes_the_settings_of_the_checkpoint(evaluated, command):
    plain, _ = command(evaluation_realnet, *DOTS, *folders("judged"), "--no-pictures")
    other = ["dataset.input_size=[32, 48]", "dataset.pixel_mean=[0.1, 0.2, 0.3]", "net.rrs.kwargs.mode_numbers=[4, 4]"]
    other += ["dataset.image_reader.kwargs.color_mode=GRAY"]
    overrides = [part for setting in other for part in ("--set", setting)]
    out, _ = command(evaluation_realnet, *DOTS, *folders("judged"), "--no-pictures", *overrides)
    row = next(line for line in plain.splitlines() if line.startswith("dots "))
    assert row in out.splitlines()
    for key in ("dataset.input_size: [64, 64] (in the YAML: [32, 48])", "dataset.pixel_mean", "net", "color_mode: RGB"):
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
    assert "nothing is left to do: all 2 epochs (trainer.max_epoch) are done" in out
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
    assert load_checkpoint(path)["position"] == {"epoch": 1, "step": 5, "step_in_epoch": 0}


def test_shifted_class_numbers_are_refused(command, workspace):
    command(train_classifier, *folders("shifted"), *ONE_EPOCH)
    path = workspace.out / "shifted/checkpoints/ckpt_last.pth.tar"
    save_checkpoint(path, {**load_checkpoint(path), "classes": ["bolts", "dots"]})
    _, err = command(train_classifier, *folders("shifted"), "--resume", code=2)
    assert "was trained on the classes bolts, dots, and the image list has dots, lines" in err


def test_a_changed_image_list_is_said(command, workspace):
    command(train_realnet, *DOTS, *folders("relisted"), *ONE_EPOCH)
    lines = (workspace.data / "samples/train_dots.json").read_text().splitlines()
    (workspace.data / "samples/fewer_dots.json").write_text("\n".join(lines[:-1]))
    fewer = ["--set", "dataset.train.meta_file=data/tiny/samples/fewer_{}.json", "--set", "trainer.max_epoch=2"]
    out, _ = command(train_realnet, *DOTS, *folders("relisted"), *fewer, "--resume")
    assert "changed since: training list: '8 images" in out
    assert "-> '7 images" in out


def test_the_reason_of_a_refused_resume_is_whole(command, workspace):
    command(train_realnet, *DOTS, *folders("refused"), *ONE_EPOCH)
    other = ["--set", "net.rrs.kwargs.mode_numbers=[4, 4]", "--resume"]
    _, err = command(train_realnet, *DOTS, *folders("refused"), *other, code=2)
    assert "size mismatch for rrs.decoder1" in err
    assert len(err.strip().splitlines()) == 1


def test_a_validation_that_a_signal_ended_is_made_up_for(command, workspace, monkeypatch):
    two_epochs = ["--set", "trainer.max_epoch=2"]
    command(train_realnet, *DOTS, *folders("unstopped"), *two_epochs)

    def stopped(*arguments: object, **options: object) -> None:
        raise Stopped(15)

    with monkeypatch.context() as patched:
        patched.setattr(train_realnet, "predict_maps", stopped)
        out, _ = command(train_realnet, *DOTS, *folders("stopped"), *two_epochs, code=143)
        assert "signal 15: saved after step 2, in the validation; continue with --resume" in out
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


def test_overwriting_deletes_nothing_before_the_new_run_can_start(command, workspace):
    command(train_diffusion, *folders("kept"), *ONE_EPOCH)
    folder = workspace.out / "kept/checkpoints"
    before = sorted(path.name for path in folder.iterdir())
    _, err = command(train_diffusion, *folders("kept"), "--overwrite", "--set", "unet.pertrain_path=gone.pt", code=2)
    assert "gone.pt does not exist" in err
    assert sorted(path.name for path in folder.iterdir()) == before
