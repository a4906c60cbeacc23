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
from utils.checkpoint import LAST


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
