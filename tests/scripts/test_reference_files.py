"""Checkpoints as the reference program writes them: EasyDict settings, numpy scalars, tensors named `module.`."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import evaluation_realnet
import predict
import sample
import train_diffusion
from models import build_realnet
from models.sdas import create_classifier_unet, create_diffusion_unet
from tests.conftest import CLASSIFIER, REPOSITORY, UNET, settings
from tests.in_process import run
from utils.checkpoint import load_checkpoint
from utils.errors import UsageError

COMPAT = REPOSITORY / "tests/fixtures/compat"
NUMPY = ["numpy1", "numpy2"]


def reference_file(target: Path, kind: str, numpy: str, network: torch.nn.Module, arch: object = None) -> Path:
    """An envelope of the reference program with a state_dict (and another `arch`) put in, as it would pickle them."""
    from easydict import EasyDict

    # The envelope as the reference program sees it; these files are our own fixtures.
    content = torch.load(COMPAT / f"reference_{kind}_{numpy}.pth.tar", weights_only=False)
    content["state_dict"] = {f"module.{name}": value for name, value in network.state_dict().items()}
    if arch is not None:
        content["arch"] = [EasyDict(part) for part in arch] if isinstance(arch, list) else EasyDict(arch)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, target)
    return target


@pytest.mark.parametrize("numpy", NUMPY)
@pytest.mark.parametrize(
    ("kind", "figure", "value"),
    [("realnet", "best_metric", 0.985), ("diffusion", "loss", 0.15), ("classifier", "acc", 0.5)],
)
def test_numpy_scalars_become_python_numbers(kind, figure, value, numpy):
    content = load_checkpoint(COMPAT / f"reference_{kind}_{numpy}.pth.tar")
    assert type(content[figure]) is float
    assert content[figure] == pytest.approx(value)
    assert isinstance(content["arch"], list if kind == "realnet" else dict)


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.float64(-1e300), np.int64(7), np.bool_(True), np.uint8(255), np.float16(2)]
)
def test_all_plain_numpy_scalars_are_read(value, tmp_path):
    torch.save({"value": value, "order": np.dtype(">f8").type(3)}, tmp_path / "a.pt")
    content = load_checkpoint(tmp_path / "a.pt")
    assert content["value"] == value.item()
    assert type(content["value"]) is type(value.item())


@pytest.mark.parametrize(
    "value",
    [np.zeros(3), np.str_("text"), np.datetime64("2024-01-01"), np.complex64(1), np.array([("a", 1)], "U1,i4")[0]],
)
def test_other_numpy_values_are_refused(value, tmp_path):
    torch.save({"value": value}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="loaded safely"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 a JPEG", b"<!doctype html>", b"# RealNet\n"])
def test_a_file_of_another_kind_is_said_to_be_one(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UsageError, match=r"loaded safely: it is no file that torch\.save writes"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "name", ["numpy.core.multiarray._reconstruct", "numpy.load", "numpy._core.multiarray.fromstring"]
)
def test_no_other_numpy_function_is_called(name, tmp_path):
    module, _, function = name.rpartition(".")
    buffer = io.BytesIO()
    torch.save({"value": 1}, buffer)
    program = f"c{module}\n{function}\n(tR.".encode()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "a.pt", "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, program if info.filename.endswith("data.pkl") else source.read(info))
    with pytest.raises(UsageError, match="loaded safely"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.fixture(scope="module")
def realnet_config(workspace):
    return yaml.safe_load((workspace.out / "realnet.yaml").read_text())


@pytest.mark.parametrize("numpy", NUMPY)
def test_a_detector_of_the_reference_is_evaluated_and_predicts(numpy, realnet_config, workspace, monkeypatch, capsys):
    torch.manual_seed(0)
    network = build_realnet(realnet_config)
    # The reference stores the structure and what it measured in the networks' arguments.
    arch = [dict(part, kwargs=dict(part["kwargs"])) for part in realnet_config["net"]]
    arch[0]["kwargs"] = {"backbone": "resnet18", "outlayers": ["layer1"]}
    arch[1]["kwargs"] |= {
        "structure": realnet_config["structure"],
        "inplanes": {"layer1": 64},
        "instrides": {"layer1": 4},
    }
    path = reference_file(workspace.root / f"ref_{numpy}/ckpt_best.pth.tar", "realnet", numpy, network, arch)
    # The networks come from the file, whatever the YAML says of them.
    other = ["--set", "structure.0.layers=[{idx: layer2, planes: 32}]", "--set", "saver.results_dir=ref_results/"]
    arguments = ["--dataset", "tiny", "--class_name", "dots", "--checkpoint", str(path), "--no-pictures", *other]
    code, out, err = run(evaluation_realnet.main, arguments, workspace.root, monkeypatch, capsys)
    assert code == 0, err
    assert any(line.startswith("dots ") for line in out.splitlines())
    arguments = [
        "--checkpoint",
        str(path),
        "--config",
        "experiments/tiny/realnet.yaml",
        "--input",
        "data/tiny/images/dots/test",
    ]
    output = workspace.root / f"ref_{numpy}/out"
    code, out, err = run(
        predict.main, [*arguments, "--output", str(output), "--no-pictures"], workspace.root, monkeypatch, capsys
    )
    assert code == 0, err
    assert len((output / "scores.csv").read_text().splitlines()) == 9
    without = [*arguments[:2], *arguments[4:], "--output", str(output / "2")]
    code, _, err = run(predict.main, without, workspace.root, monkeypatch, capsys)
    assert code == 2
    assert "pass the realnet.yaml that it was trained with as --config" in err


@pytest.mark.parametrize("numpy", NUMPY)
def test_diffusion_and_classifier_of_the_reference_sample_and_are_tuned(numpy, workspace, monkeypatch, capsys):
    torch.manual_seed(0)
    # The reference's classifiers always see 64 channels a head.
    heads = {**UNET, "num_head_channels": 32}
    arch = load_checkpoint(COMPAT / f"reference_diffusion_{numpy}.pth.tar")["arch"]
    unet = reference_file(
        workspace.root / f"ref_{numpy}/unet/ckpt_10.pth.tar",
        "diffusion",
        numpy,
        create_diffusion_unet(**heads),
        {**arch, "unet": {**arch["unet"], **heads}},
    )
    arch = load_checkpoint(COMPAT / f"reference_classifier_{numpy}.pth.tar")["arch"]
    classifier = reference_file(
        workspace.root / f"ref_{numpy}/classifier/ckpt_5.pth.tar",
        "classifier",
        numpy,
        create_classifier_unet(**CLASSIFIER, image_size=16),
        {**arch, "classifier": {**arch["classifier"], **CLASSIFIER}},
    )
    config = settings("data/tiny", "experiments/tiny")["sample"]
    # Nothing of the networks stands in the YAML.
    config |= {"unet": {"pertrain_path": str(unet)}, "classifier": {"pertrain_path": str(classifier)}}
    config |= {"classes": ["dots", "lines"], "sample_number": 2, "workspace": {"root": f"data/tiny/ref_{numpy}"}}
    path = workspace.write_settings(f"sample_{numpy}", config)
    code, _, err = run(sample.main, ["--config", str(path)], workspace.root, monkeypatch, capsys)
    assert code == 0, err
    assert Image.open(workspace.data / f"ref_{numpy}/lines/rank0_1.jpg").size == (16, 16)
    tuned = [
        "--set",
        f"unet.pertrain_path={unet}",
        "--set",
        "trainer.max_epoch=1",
        "--set",
        f"saver.checkpoints_dir=ref_{numpy}/",
    ]
    code, out, err = run(train_diffusion.main, ["--dataset", "tiny", *tuned], workspace.root, monkeypatch, capsys)
    assert code == 0, err
    count = len(load_checkpoint(unet)["state_dict"])
    assert f"loaded {count} of {count} tensors" in out


def test_envelopes_hold_what_the_reference_pickles():
    """The fixtures are real pickles of EasyDict and numpy scalars, so the tests above mean something."""
    for numpy, module in (("numpy1", b"numpy.core.multiarray"), ("numpy2", b"numpy._core.multiarray")):
        with zipfile.ZipFile(COMPAT / f"reference_realnet_{numpy}.pth.tar") as opened:
            name = next(name for name in opened.namelist() if name.endswith("data.pkl"))
            assert module in opened.read(name)
            assert b"easydict" in opened.read(name)
    assert pickle.loads(pickle.dumps(np.float64(1))) == 1
