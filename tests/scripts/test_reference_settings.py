"""The reference program's settings and image lists as its users have them: its keys, file names and CRLF line ends."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import evaluation_realnet
import sample
import train_classifier
import train_diffusion
import train_realnet
from datasets.catalog import CATALOG
from datasets.lists import class_names, listed_classes, read_list
from tests.conftest import CLASSIFIER, REALNET, UNET
from tests.in_process import run
from utils.config import load_config

# Folder and dataset.type, number of classes, epochs of the checkpoints that sample.yaml names.
REFERENCE = {
    "MVTec-AD": ("mvtec", 15, 240, 428),
    "VisA": ("visa", 12, 120, 188),
    "MPDD": ("mpdd", 6, 825, 805),
    "BTAD": ("btad", 3, 375, 685),
}
# (image, mask or None) of each kind of line in the reference's test lists. MVTec-AD's lists of one class lack clsname.
LISTED = {
    "MVTec-AD": ("toothbrush", "toothbrush/test/defective/023.png", "toothbrush/ground_truth/defective/023_mask.png"),
    "VisA": ("candle", "candle/test/ko/056.JPG", "candle/ground_truth/ko/056.png"),
    "MPDD": (
        "connector",
        "connector/test/parts_mismatch/013.png",
        "connector/ground_truth/parts_mismatch/013_mask.png",
    ),
    "BTAD": ("03", "03/test/ko/0040.bmp", "03/ground_truth/ko/0040.bmp"),
}
SCRIPTS = ("diffusion", "classifier", "sample", "realnet")


def reference_settings(dataset: str) -> dict[str, dict]:
    """Every key of the reference's four files of a data set, with its value."""
    folder, classes, unet_epoch, classifier_epoch = REFERENCE[dataset]
    data, out = f"data/{dataset}", f"experiments/{dataset}"
    plain = {"hflip": False, "vflip": False, "rotate": False}
    norm = {"pixel_mean": [0.485, 0.456, 0.406], "pixel_std": [0.229, 0.224, 0.225]}
    process = {"T": 1000, "section_counts": "ddim1000", "beta_scheduler": "linear", "rescale_timesteps": False}
    adam = {"lr": 0.0001, "betas": [0.9, 0.999]}
    channels = {"channel_mult": [1, 1, 2, 2, 4, 4], "class_number": classes, "classifier_depth": 2}
    unet = {
        "classifier_width": 256, "learn_sigma": True, "attention_resolutions": [32, 16, 8], "dropout": 0.0,
        "num_heads": 4, "num_heads_upsample": -1, "num_head_channels": 64, "use_scale_shift_norm": True,
        "resblock_updown": True, **channels,
    }  # fmt: skip
    classifier = {
        "classifier_width": 128, "classifier_attention_resolutions": [32, 16, 8], "classifier_pool": "attention",
        "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True, **channels,
    }  # fmt: skip

    def reader(prefix: str) -> dict:
        return {"type": "opencv", "kwargs": {"image_dir": f"{prefix}{data}/{folder}/", "color_mode": "RGB"}}

    def saver(stage: str, *kinds: str) -> dict:
        return {("checkpoints_dir" if kind == "checkpoints" else f"{kind}_dir"): f"{stage}_{kind}/" for kind in kinds}

    def losses(*names: str) -> list[dict]:
        return [{"name": name, "type": name, "kwargs": {"weight": 1.0}} for name in names]

    uni = {"meta_file": f"./{data}/samples/train_uni.json"}
    sdas = {"type": "sdas", "image_reader": reader("./"), "train": {**uni, **plain}, "input_size": [256, 256], **norm}
    optimizer = {"type": "Adam", "kwargs": {**adam, "weight_decay": 0}}
    seed = {"version": "v1.0.0", "random_seed": 100}
    return {
        "diffusion": {
            **seed,
            "dataset": {**sdas, "test": uni, "batch_size": 5, "workers": 2},
            "unet": {**unet, "pertrain_path": "pretrain/256x256_diffusion.pt"},
            "trainer": {
                "use_fp16": False, "max_epoch": 1000, "val_batch_number": 6, "val_freq_epoch": 10,
                "print_freq_step": 30, "accumulate": 3, "clip_max_norm": 1.0, "ema_decay": 0.9999,
                "optimizer": optimizer,
            },
            "criterion": losses("ImageMSELoss"),
            "TrainSampler": process,
            "TestSampler": {**process, "section_counts": "ddim20"},
            "saver": saver("diffusion", "checkpoints", "log", "vis"),
        },
        "classifier": {
            **seed,
            # No test list: the reference validates nothing here.
            "dataset": {**sdas, "batch_size": 20, "workers": 4},
            "classifier": {**classifier, "pertrain_path": "pretrain/256x256_classifier.pt"},
            "trainer": {
                "max_epoch": 1000, "save_freq_epoch": 5, "print_freq_step": 20, "clip_max_norm": 1.0,
                "optimizer": optimizer,
            },
            "criterion": losses("ClassifierCrossEntropyLoss"),
            "TrainSampler": process,
            "saver": saver("classifier", "checkpoints", "log"),
        },
        "sample": {
            "version": "v1.0.0",
            "dataset": {"batch_size": 16, "channels": 3, "H": 256, "W": 256},
            "classifier_scale": 1.0,
            "sample_number": 256,
            "unet": {
                **unet,
                "pertrain_path": f"{out}/diffusion_checkpoints/{folder}_diffusion_ckpt_epoch_{unet_epoch}.pt",
            },
            "classifier": {
                **classifier,
                "pertrain_path": f"{out}/classifier_checkpoints/{folder}_classifier_ckpt_epoch_{classifier_epoch}.pt",
            },
            "TestSampler": {**process, "section_counts": "ddim20"},
            "workspace": {"root": f"{data}/sdas"},
        },
        "realnet": {
            **seed,
            "dataset": {
                "type": folder,
                "image_reader": reader(""),
                "train": {
                    "meta_file": f"{data}/samples/train_{{}}.json", "dtd_dir": "data/DTD/images",
                    "sdas_dir": f"{data}/sdas/{{}}", "dtd_transparency_range": [0.2, 1.0],
                    "sdas_transparency_range": [0.5, 1.0], "perlin_scale": 6, "min_perlin_scale": 0, **plain,
                    "anomaly_types": {"normal": 0.5, "sdas": 0.5},
                },
                "test": {"meta_file": f"./{data}/samples/test_{{}}.json"},
                "input_size": [256, 256], **norm, "batch_size": 16, "workers": 4,
            },
            "structure": [
                {"name": f"block{k}", "layers": [{"idx": f"layer{k}", "planes": planes}], "stride": 2 << k}
                for k, planes in enumerate([256, 512, 512, 256], start=1)
            ],
            "net": [
                {"name": "backbone", "type": "models.backbones.Backbone", "frozen": True,
                 "kwargs": {"backbone": "wide_resnet50_2"}},
                {"name": "afs", "type": "models.afs.AFS", "frozen": True, "prev": "backbone",
                 "kwargs": {"init_bsn": 64}},
                {"name": "recon", "type": "models.recon.ReconstructionLayer", "prev": "afs",
                 "kwargs": {"num_res_blocks": 2, "hide_channels_ratio": 0.5, "channel_mult": [1, 2, 4],
                            "attention_mult": [2, 4]}},
                {"name": "rrs", "type": "models.rrs.RRS", "prev": "recon",
                 "kwargs": {"modes": ["max", "mean"], "mode_numbers": [256, 256], "num_residual_layers": 2,
                            "stop_grad": False}},
            ],
            "trainer": {
                "max_epoch": 1000, "val_freq_epoch": 5, "print_freq_step": 20,
                "optimizer": {"type": "Adam", "kwargs": adam},
            },
            "saver": saver("realnet", "checkpoints", "log", "vis"),
            "criterion": losses("SegmentCrossEntropyLoss", "FeatureMSELoss"),
            "evaluator": {
                "key_metric": "mean",
                "metrics": {"auc": [{"name": "image", "kwargs": {"avgpool_size": [16, 16]}}, {"name": "pixel"}]},
            },
        },
    }  # fmt: skip


def write_crlf(path: Path, text: str) -> Path:
    """Write text as the reference stores it: CRLF line ends, most files without one at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.strip().replace("\n", "\r\n").encode())
    return path


def flat(settings: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(settings, dict):
        return {prefix[:-1]: settings}
    return {key: value for name, part in settings.items() for key, value in flat(part, f"{prefix}{name}.").items()}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("dataset", REFERENCE)
def test_settings_of_the_reference_load_and_keep_every_value(dataset, script, tmp_path):
    given = reference_settings(dataset)[script]
    path = write_crlf(tmp_path / f"{script}.yaml", yaml.safe_dump(given))
    loaded = flat(load_config(path, (), script))
    assert {key: loaded.get(key, "not a setting") for key in flat(given)} == flat(given)


@pytest.mark.parametrize("dataset", REFERENCE)
def test_class_numbers_are_those_of_the_reference(dataset):
    """The reference numbers the classes alphabetically; its diffusion models and classifiers depend on it."""
    folder, count, *_ = REFERENCE[dataset]
    info = CATALOG[dataset]
    assert (info.type, len(info.classes)) == (folder, count)
    assert list(info.classes) == sorted(info.classes)


@pytest.mark.parametrize("with_clsname", [True, False])
@pytest.mark.parametrize("dataset", LISTED)
def test_image_lists_of_the_reference_are_read(dataset, with_clsname, tmp_path):
    name, filename, maskname = LISTED[dataset]
    for image in (filename, maskname):
        (tmp_path / image).parent.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / image)
    entry = {"filename": filename, "label": 1, "label_name": "defective", "maskname": maskname}
    text = json.dumps({**entry, "clsname": name} if with_clsname else entry)
    path = write_crlf(tmp_path / f"samples/test_{name}.json", f"{text}\n")
    (read,) = read_list(path, tmp_path)
    assert (read.filename, read.label, read.clsname, read.maskname) == (filename, 1, name, maskname)
    assert read.defect_type == filename.split("/")[2]
    write_crlf(tmp_path / "samples/test_uni.json", text)
    assert listed_classes(str(tmp_path / "samples/test_{}.json")) == class_names([read]) == [name]


def test_the_chain_runs_with_settings_of_the_reference(workspace, monkeypatch, capsys):
    """Only sizes, paths of the tiny data, and starting weights differ from the reference's files."""
    content, out = reference_settings("MVTec-AD"), workspace.root / "experiments/MVTec-AD"
    images, lists = "./data/tiny/images/", "./data/tiny/samples/"
    for script in ("diffusion", "classifier"):
        dataset = content[script]["dataset"]
        dataset["image_reader"]["kwargs"]["image_dir"] = images
        for split in {"train", "test"} & set(dataset):
            dataset[split] = {**dataset[split], "meta_file": f"{lists}train_uni.json"}
        dataset |= {"input_size": [16, 16], "workers": 0}
        content[script]["trainer"]["max_epoch"] = 1
    content["diffusion"]["unet"] |= UNET
    content["diffusion"]["TestSampler"]["section_counts"] = "ddim2"
    content["classifier"]["classifier"] |= CLASSIFIER
    for section, stage in (("unet", "diffusion"), ("classifier", "classifier")):
        sizes = {key: value for key, value in content[stage][section].items() if key != "pertrain_path"}
        trained = f"experiments/MVTec-AD/{stage}_checkpoints/ckpt_1.pth.tar"
        content["sample"][section] |= {**sizes, "pertrain_path": trained}
    content["sample"] |= {"dataset": {"batch_size": 2, "channels": 3, "H": 16, "W": 16}, "sample_number": 2}
    content["sample"]["TestSampler"]["section_counts"] = "ddim2"
    dataset = content["realnet"]["dataset"]
    dataset["image_reader"]["kwargs"]["image_dir"] = images
    dataset["train"] |= {"meta_file": f"{lists}train_{{}}.json", "sdas_dir": "data/MVTec-AD/sdas/{}"}
    dataset["test"]["meta_file"] = f"{lists}test_{{}}.json"
    # The foreground rules of mvtec are for its own classes.
    dataset |= {"type": "tiny", "input_size": [64, 64], "workers": 0}
    content["realnet"]["trainer"]["max_epoch"] = 1
    content["realnet"] |= {key: REALNET[key] for key in ("structure", "net")}
    for script, settings in content.items():
        write_crlf(out / f"{script}.yaml", yaml.safe_dump(settings))
    one = ["--class_name", "dots"]
    for main, arguments in (
        (train_diffusion.main, []),
        (train_classifier.main, []),
        (sample.main, []),
        (train_realnet.main, one),
        (evaluation_realnet.main, one),
    ):
        code, _, err = run(main, ["--dataset", "MVTec-AD", *arguments], workspace.root, monkeypatch, capsys)
        assert code == 0, err
    assert len(list((workspace.root / "data/MVTec-AD/sdas/dots").glob("rank0_*.jpg"))) == 2
    assert (out / "realnet_checkpoints/dots/ckpt_best.pth.tar").is_file()
