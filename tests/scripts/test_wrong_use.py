"""Wrong use of the scripts ends in a line or two, without a traceback."""

import pytest

from tests import quick_start
from tests.conftest import REPOSITORY, Workspace, script_environment

NEW = ["--set", "saver.checkpoints_dir=new/"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_realnet.py", [], "--class_name is missing: one of dots, lines"),
        ("train_realnet.py", ["--class_name", "squares"], "known are dots, lines"),
        ("train_realnet.py", ["--class_name", "dots", "--set", "trainer.max_epcoh=1"], "trainer.max_epoch?"),
        (
            "train_realnet.py",
            [
                "--class_name",
                "dots",
                "--set",
                "dataset.train.anomaly_types={sdas: 1.0}",
                "--set",
                "dataset.train.sdas_dir=no/{}",
            ],
            "sample.py",
        ),
        ("train_realnet.py", ["--class_name", "dots", "--set", "trainer.optimizer.type=Adem"], "Adem"),
        ("train_realnet.py", ["--class_name", "dots", "--device", "cuda"], "--device cpu"),
        ("evaluation_realnet.py", ["--class_name", "dots", "--checkpoint", "no.pth.tar"], "no.pth.tar"),
        ("train_diffusion.py", ["--config", "no.yaml"], "no.yaml does not exist"),
        ("train_diffusion.py", ["--set", "unet.class_number=1"], "unet.class_number"),
        ("train_diffusion.py", ["--set", "unet.pertrain_path=pretrain/256x256_diffusion.pt", *NEW], "openaipublic"),
        ("train_diffusion.py", ["--set", "trainer.amp=half"], "half"),
        ("train_classifier.py", ["--set", "classifier.classifier_pool=max"], "classifier_pool"),
        ("sample.py", ["--set", "unet.pertrain_path=experiments/nothing/"], "train the model first"),
        ("sample.py", ["--class_name", "squares", "--set", "unet.pertrain_path=MODEL"], "dots, lines"),
        ("sample.py", ["--strength", "0.3", "0.1"], "range"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(diffusion, classifier, script, arguments, message):
    model = str(diffusion.out / "diffusion_checkpoints/")
    done = diffusion.run(script, *(part.replace("MODEL", model) for part in arguments), code=2)
    assert message in done.stderr


def test_an_unknown_data_set_names_the_known_ones(workspace):
    done = workspace.run("train_diffusion.py", "--dataset", "nothing", code=2)
    assert f"{workspace.root / 'experiments'} has tiny" in done.stderr


def test_a_broken_image_in_a_loader_worker_is_named(tmp_path):
    workspace = Workspace(tmp_path)
    (workspace.data / "images/dots/train/good/003.png").write_bytes(b"broken")
    for workers in (0, 1):
        arguments = ["--class_name", "dots", "--set", f"dataset.workers={workers}"]
        done = workspace.run("train_realnet.py", *arguments, code=2)
        assert "dots/train/good/003.png is not a readable image" in done.stderr


def test_wrong_use_is_printed_once_with_two_ranks(workspace):
    # The other rank waits for rank 0 and its launcher, which may take longer than usual at a high load.
    program = "from utils import cli; cli.SECONDS_FOR_RANK_0 = 100; import train_realnet; cli.run(train_realnet.main)"
    environment = {**script_environment(), "PYTHONPATH": str(REPOSITORY)}
    command = ["-c", program, "--dataset", "tiny", "--class_name", "squares"]
    done = quick_start.run(command, workspace.root, environment, ranks=2)
    assert done.returncode == 1
    assert done.stderr.count("known are dots, lines") == 1


def test_offline_weights_end_in_one_line_and_exit_code_1(workspace):
    arguments = ["--class_name", "dots", "--set", "net.backbone.kwargs.weights=auto", *NEW]
    environment = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = workspace.run("train_realnet.py", *arguments, code=1)
    assert "resnet18-f37072fd.pth" in done.stderr
    assert "put it into pretrain/" in done.stderr
    assert "Traceback" not in done.stderr
