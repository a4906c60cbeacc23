"""Every place that loads a file refuses a pickle that would run a command, and does not run it."""

import os
import pickle
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
from tests.in_process import run
from utils.checkpoint import LAST, load_checkpoint


class Command:
    """Calls os.system when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.witness}",)


REALNET = ["--class_name", "dots"]
PLACES = {
    "unet.pertrain_path": (train_diffusion, ["--set", "unet.pertrain_path={file}"]),
    "classifier.pertrain_path": (train_classifier, ["--set", "classifier.pertrain_path={file}"]),
    "sampling's unet": (sample, ["--set", "unet.pertrain_path={file}"]),
    "sampling's folder": (sample, ["--set", "unet.pertrain_path={folder}"]),
    "backbone weights": (train_realnet, [*REALNET, "--set", "net.backbone.kwargs.weights={file}"]),
    "resumed diffusion": (train_diffusion, ["--resume", "--set", "saver.checkpoints_dir={folder}"]),
    "resumed classifier": (train_classifier, ["--resume", "--set", "saver.checkpoints_dir={folder}"]),
    "resumed realnet": (train_realnet, [*REALNET, "--resume", "--set", "saver.checkpoints_dir={parent}"]),
    "evaluation": (evaluation_realnet, [*REALNET, "--checkpoint", "{file}"]),
    "prediction": (predict, ["--checkpoint", "{file}", "--input", "data/tiny/images", "--output", "{folder}/out"]),
    "export": (export, ["--checkpoint", "{file}", "--output", "{folder}/out"]),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in a state_dict"])
@pytest.mark.parametrize("place", PLACES)
def test_a_command_in_a_file_is_not_run(place, wrapped, workspace, tmp_path, monkeypatch, capsys):
    script, arguments = PLACES[place]
    witness, folder = tmp_path / "ran", tmp_path / "dots"
    folder.mkdir()
    payload = {"state_dict": {"w": Command(witness)}, "epoch": 1} if wrapped else Command(witness)
    for name in ("ckpt_1.pth.tar", LAST):
        if wrapped:
            torch.save(payload, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(payload))
    values = {"file": folder / "ckpt_1.pth.tar", "folder": folder, "parent": tmp_path}
    filled = [argument.format(**values) for argument in arguments]
    dataset = [] if script in (predict, export) else ["--dataset", "tiny", "--set", "saver.log_dir=hostile_log/"]
    code, _, err = run(script.main, [*dataset, *filled], workspace.root, monkeypatch, capsys)
    assert code == 2, err
    assert "ckpt_" in err
    assert len(err.splitlines()) == 1
    assert not witness.exists()


@pytest.mark.parametrize("script", [train_diffusion, train_realnet, sample])
def test_yaml_cannot_create_objects(script, workspace, tmp_path, monkeypatch, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(f"unet: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    code, _, err = run(script.main, ["--config", str(path)], workspace.root, monkeypatch, capsys)
    assert code == 2
    assert f"{path}, line 1" in err
    assert not (tmp_path / "ran").exists()


# ---- values in checkpoints that are no code --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(workspace):
    """A run of two epochs, of which the first is done and saved for resuming."""
    folders = {"checkpoints_dir": "checkpoints", "log_dir": "log", "vis_dir": "vis"}
    arguments = [part for key, name in folders.items() for part in ("--set", f"saver.{key}=values/{name}/")]
    workspace.run("train_realnet.py", *REALNET, *arguments, "--set", "trainer.max_epoch=1")
    workspace.run("train_diffusion.py", *arguments, "--set", "trainer.max_epoch=1")
    return workspace, arguments


def moments(content):
    return content["stepper"]["optimizer"]["state"][0]


STATES = {
    "best_metric is nan": (lambda c: c.update(best_metric=float("nan")), "best_metric is nan"),
    "best_metric is text": (lambda c: c.update(best_metric="best"), "best_metric is 'best'"),
    "epoch is huge": (lambda c: c["position"].update(epoch=10**30), "position.epoch is 1000"),
    "epoch is negative": (lambda c: c["position"].update(epoch=-1), "position.epoch is -1"),
    "step is a fraction": (lambda c: c["position"].update(step=1.5), "position.step is 1.5"),
    "a step beyond the epoch": (lambda c: c["position"].update(step_in_epoch=99), "beyond the end of the epoch"),
    "position is a tensor": (lambda c: c.update(position=torch.ones(3)), "cannot be resumed"),
    "optimiser without state": (lambda c: c["stepper"]["optimizer"].update(state=None), "cannot be resumed"),
    "optimiser is text": (lambda c: c["stepper"].update(optimizer="Adam"), "cannot be resumed"),
    "moments of another shape": (lambda c: moments(c).update(exp_avg=torch.ones(3)), "has the shape [3]"),
    "sparse moments": (lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].to_sparse()), "is sparse"),
    "a run that is a number": (lambda c: c.update(run=3), None),
    "classes that are a tensor": (lambda c: c.update(classes=torch.ones(2)), None),
    "another class": (lambda c: c["run"].update({"class": "lines"}), "another class ('lines' -> 'dots')"),
    "weights that are not finite": (
        lambda c: c["state_dict"]["rrs.bn_idx.running_var"].fill_(float("inf")),
        "the weights hold values that are not finite",
    ),
    "AFS's indices out of range": (
        lambda c: c["state_dict"]["afs.indexes.block1_layer1"].fill_(64),
        "has to hold different channels",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_a_run_cannot_go_on_from_is_refused(name, trained, tmp_path, monkeypatch, capsys):
    workspace, _ = trained
    change, says = STATES[name]
    content = load_checkpoint(workspace.out / "values/checkpoints/dots" / LAST)
    change(content)
    (tmp_path / "checkpoints/dots").mkdir(parents=True)
    torch.save(content, tmp_path / "checkpoints/dots" / LAST)
    arguments = ["--dataset", "tiny", *REALNET, "--resume", "--set", f"saver.checkpoints_dir={tmp_path}/checkpoints/"]
    arguments += ["--set", f"saver.log_dir={tmp_path}/log/", "--set", f"saver.vis_dir={tmp_path}/vis/"]
    code, out, err = run(train_realnet.main, arguments, workspace.root, monkeypatch, capsys)
    if says is None:
        assert code == 0, err
    else:
        assert code == 2, out
        assert says in err
        assert len(err.splitlines()) == 1


SETTINGS = {
    "T": (lambda c: c["process"].update(T=10**12), "TestSampler.T: 1000000000000 has to be at most"),
    "depth": (lambda c: c["arch"].update(classifier_depth=10**6), "unet.classifier_depth: 1000000 has to be at most"),
    "dropout": (lambda c: c["arch"].update(dropout=float("nan")), "unet.dropout: nan is not finite"),
    "learn_sigma": (lambda c: c["arch"].update(learn_sigma="no"), "unet.learn_sigma: 'no' is not True or False"),
    "classes twice": (lambda c: c.update(classes=["dots", "dots"]), "the class 'dots' is there twice"),
    "classes": (lambda c: c.update(classes=["dots", "../lines"]), "the class '../lines' holds a slash"),
    "process": (lambda c: c.update(process=torch.ones(2)), None),
    "input size": (lambda c: c.update(input_size=torch.ones(2)), None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sampling_checks_the_settings_in_a_checkpoint(name, trained, tmp_path, monkeypatch, capsys):
    workspace, _ = trained
    change, says = SETTINGS[name]
    content = load_checkpoint(workspace.out / "values/checkpoints/ckpt_1.pth.tar")
    change(content)
    torch.save(content, tmp_path / "ckpt_1.pth.tar")
    values = {
        "unet.pertrain_path": tmp_path,
        "workspace.root": tmp_path / "out",
        "sample_number": 1,
        "saver.log_dir": tmp_path / "log",
    }
    arguments = ["--dataset", "tiny", "--no-classifier"]
    arguments += [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    code, out, err = run(sample.main, arguments, workspace.root, monkeypatch, capsys)
    if says is None:
        assert code == 0, err
    else:
        assert code == 2, out
        assert says in err
        assert not list((tmp_path / "out").rglob("*.jpg"))
