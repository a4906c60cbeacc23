"""What prepare_data.py finds in images and masks, and the settings that it writes."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageFilter

import prepare_data
from datasets.build import check_realnet_data
from datasets.catalog import CATALOG
from models import check_realnet
from models.sdas import SpacedDiffusion, check_training_size, create_classifier_unet, create_diffusion_unet
from preparation import diffusion_presets, settings_files
from preparation.presets import PRESETS, preset_names
from tests.conftest import REPOSITORY
from tests.in_process import run
from tests.layout_trees import image_file, mvtec_class
from utils.config import load_config, model_kwargs
from utils.distributed import usable_cores
from utils.errors import RunError, UsageError


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    def call(*arguments: str, code: int = 0) -> str:
        given = ["--dataset", "parts", "--root", "shots", *arguments]
        status, out, err = run(prepare_data.main, given, tmp_path, monkeypatch, capsys)
        assert status == code, out + err
        return out + err

    return call


# ---- values of images ------------------------------------------------------------------------------------------------


def deep_images(folder: Path, largest: int, colour: bool = False) -> None:
    """Three random 16-bit images, of which one reaches the largest value."""
    import cv2

    rng = np.random.default_rng(largest)
    folder.mkdir(parents=True)
    for i in range(3):
        values = rng.integers(0, largest - 50, (40, 48, 3) if colour else (40, 48)).astype(np.uint16)
        values[5, 5] = largest if i == 1 else 0
        assert cv2.imwrite(str(folder / f"{i}.png"), values)


@pytest.mark.parametrize(
    ("largest", "colour", "bits"),
    [
        (4095, False, 12),
        (4096, False, 14),
        (1023, False, 10),
        (65535, False, None),
        (4095, True, 12),
        (65535, True, None),
    ],
)
def test_16_bit_files_with_fewer_bits_are_found(largest, colour, bits, tmp_path, prepare):
    deep_images(tmp_path / "shots", largest, colour)
    out = prepare()
    if bits is None:
        assert "to check" not in out
    else:
        assert f"to check: parts: its 3 16-bit images hold no value above {largest}, so they have {bits} bits" in out
        assert f"dataset.image_reader.kwargs.bits: {bits}" in out


def test_8_bit_images_are_not_taken_for_dark_16_bit_images(tmp_path, prepare):
    for i in range(3):
        image_file(tmp_path / f"shots/{i}.png", i)
    assert "findings: none" in prepare()


def soft(path: Path) -> None:
    opened = Image.open(path)
    opened.filter(ImageFilter.GaussianBlur(2)).save(path)


def painted(values: np.ndarray) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(values).save(path)


WHITE, CLASS_NUMBERS = np.full((40, 48), 255, np.uint8), np.zeros((40, 48), np.uint8)
INVERTED = WHITE.copy()
INVERTED[10:20, 10:20] = 0
CLASS_NUMBERS[10:20, 10:20] = np.arange(1, 11)
MASKS = {
    "inverted": (painted(INVERTED), "mask marks 95% of the image; if it is inverted, white has to be the defect"),
    "white": (painted(WHITE), "mask is white all over: the whole image counts as defective"),
    "soft": (soft, "mask has soft edges ("),
    "class numbers": (painted(CLASS_NUMBERS), None),
    "as usual": (lambda path: None, None),
}


@pytest.mark.parametrize("case", MASKS)
def test_doubtful_masks_are_found_and_used(case, tmp_path, prepare):
    change, text = MASKS[case]
    mvtec_class(tmp_path / "shots", ["crack"])
    change(tmp_path / "shots/ground_truth/crack/001_mask.png")
    out = prepare()
    found = [line for line in out.splitlines() if line.startswith("to check: ")]
    if text is None:
        assert not found
    else:
        assert len(found) == 1
        assert found[0].startswith(f"to check: ground_truth/crack/001_mask.png: {text}")
    assert "without a mask" not in out


def test_a_soft_jpeg_mask_is_compression(tmp_path, prepare):
    mvtec_class(tmp_path / "shots", ["crack"])
    path = tmp_path / "shots/ground_truth/crack/001_mask.png"
    Image.open(path).save(path.with_suffix(".jpg"), quality=60)
    path.unlink()
    assert "findings: none" in prepare()


def test_a_single_training_image_is_found(tmp_path, prepare):
    image_file(tmp_path / "shots/bolts/good/0.png", 1)
    image_file(tmp_path / "shots/nuts/0.png", 2)
    image_file(tmp_path / "shots/nuts/1.png", 3)
    out = prepare()
    assert "to check: bolts: has one training image" in out
    assert out.count("to check") == 2  # and in the total


def test_copies_of_a_few_images_are_found(tmp_path, prepare):
    for number in range(24):
        image_file(tmp_path / f"shots/{number}.png", number % 3)
    out = prepare()
    assert "to check: parts: its 24 training images are 3 distinct ones and copies, such as" in out


def test_images_of_one_colour_are_found(tmp_path, prepare):
    for number in range(4):
        image_file(tmp_path / f"shots/{number}.png", number)
    Image.new("RGB", (48, 40)).save(tmp_path / "shots/black.png")
    out = prepare()
    assert out.count("has one colour all over") == 1
    assert "to check: black.png: has one colour all over; was the camera covered?" in out


def test_images_that_parts_do_not_name_are_found(tmp_path, prepare):
    for number in range(24):
        image_file(tmp_path / f"shots/{'part' * (number > 1)}{number // 2}_{number}.png", number)
    out = prepare("--parts", r"part\d+")
    assert (
        "to check: --parts: names the part of 22 of 24 images; each other counts as a part of its own: 0_0.png" in out
    )


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no such limit on this system")
def test_no_more_threads_than_allowed_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7})
    assert usable_cores() == 3


# ---- settings --------------------------------------------------------------------------------------------------------


def test_templates_are_installed():
    assert settings_files.TEMPLATES == REPOSITORY / "preparation/templates"
    assert sorted(path.name for path in settings_files.TEMPLATES.iterdir()) == sorted(settings_files.FILES)
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert 'preparation = ["templates/*.yaml"]' in text


@pytest.mark.parametrize("classes", [1, 3])
def test_all_values_reach_the_settings(classes, tmp_path):
    texts = settings_files.settings_texts(
        "My.Parts-2", classes, (119, 193), settings_files.Told("{channel: red, threshold: 7}")
    )
    configs = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        configs[name] = load_config(tmp_path / name)
        assert "MVTec-AD" not in text.replace("MVTec-AD/bottle", "")
        assert "mvtec/" not in text
        assert text.startswith(f"# {name} of My.Parts-2")
    assert len(configs) == (3 if classes == 1 else 5)
    assert "data/parts" not in texts["realnet.yaml"]
    assert "type: parts" not in texts["realnet.yaml"]
    for name, config in configs.items():
        if name != "sample.yaml":
            assert config.dataset.image_reader.kwargs.image_dir == "data/My.Parts-2/images/"
            assert config.dataset.input_size == ([119, 193] if name.startswith("realnet") else [128, 224])
        if name.startswith("realnet"):
            assert config.dataset.type == "My.Parts-2"
    assert configs["realnet.yaml"].dataset.foreground == {"channel": "red", "threshold": 7}
    assert configs["realnet.yaml"].dataset.train.sdas_dir == "data/My.Parts-2/sdas/{}"
    sample = configs["sample.yaml"]
    assert (sample.dataset.H, sample.dataset.W) == (128, 224)
    assert sample.unet.pertrain_path == "experiments/My.Parts-2/diffusion_checkpoints/"
    if classes == 1:
        assert sample.classifier is None
    else:
        assert sample.classifier.pertrain_path == "experiments/My.Parts-2/classifier_checkpoints/"
        assert configs["classifier.yaml"].classifier.class_number == configs["diffusion.yaml"].unet.class_number == 3
        assert configs["realnet_unified.yaml"].dataset.train.meta_file == "data/My.Parts-2/samples/train_uni.json"


def test_one_model_for_all_classes_has_the_networks_that_were_asked_for(tmp_path):
    """It asked for WideResNet-50 and 500 epochs, whatever the preset and the backbone."""
    networks = settings_files.Networks("quick", "squeezenet1_1", "own.pth", "half")
    texts = settings_files.settings_texts("bolts", 3, (64, 128), settings_files.Told(textures=False), networks)
    configs = {}
    for name in ("realnet.yaml", "realnet_unified.yaml"):
        (tmp_path / name).write_text(texts[name])
        configs[name] = load_config(tmp_path / name, script="realnet")
    one, unified = configs.values()
    for section in ("net", "structure", "trainer", "evaluator"):
        assert unified[section] == one[section]
    assert unified.dataset.pixel_mean == one.dataset.pixel_mean == [0.5] * 3
    assert unified.dataset.train.anomaly_types == one.dataset.train.anomaly_types
    assert unified.dataset.test.meta_file == "data/bolts/samples/test_uni.json"


@pytest.mark.parametrize("dataset", ["MVTec-AD", "VisA", "MPDD", "BTAD"])
def test_data_sets_of_ones_own_begin_with_the_settings_of_the_benchmarks(dataset, tmp_path):
    texts = settings_files.settings_texts(dataset, len(CATALOG[dataset].classes), (256, 256))
    for name, text in texts.items():
        own = tmp_path / name
        own.write_text(text.replace(f"data/{dataset}/images/", f"data/{dataset}/{CATALOG[dataset].type}/"))
        config, benchmark = load_config(own), load_config(REPOSITORY / "experiments" / dataset / name)
        if name.startswith("realnet"):
            del config.dataset["type"], benchmark.dataset["type"]
            del config.dataset["foreground"], benchmark.dataset["foreground"]
            # Not the paper's: grey images get grey anomalies.
            assert [settings.dataset.train.pop("match_grey") for settings in (config, benchmark)] == [True, False]
            # Nor that good images are held out.
            fractions = [settings.dataset.train.pop("validation_fraction") for settings in (config, benchmark)]
            assert fractions == [0.2, 0]
            assert [settings.evaluator.pop("select") for settings in (config, benchmark)] == ["synthetic", "test"]
        else:
            # What makes it fit on a smaller GPU. In sample.yaml, the networks are as their checkpoints say.
            trainer = "trainer" if "trainer" in config else None
            own, paper = ((c[trainer] if trainer else c).pop("amp") for c in (config, benchmark))
            assert (own, paper) == ("auto", "off")
            if trainer:
                network = "unet" if "unet" in config else "classifier"
                assert [c[network].pop("use_checkpoint") for c in (config, benchmark)] == [True, False]
        assert config == benchmark, name


@pytest.mark.parametrize(
    ("file", "old", "new", "text"),
    [
        ("diffusion.yaml", "@HEIGHT@", "256", "diffusion.yaml: @HEIGHT@ is missing"),
        ("sample.yaml", "TestSampler:", "Sampler:", "sample.yaml: .* is missing"),
        ("diffusion.yaml", "@WIDTH@", "@WIDTH@ @LENGTH@", "diffusion.yaml: @LENGTH@ is not a value"),
    ],
)
def test_a_template_without_a_place_for_a_value_is_named(file, old, new, text, tmp_path, monkeypatch):
    for path in settings_files.TEMPLATES.iterdir():
        content = path.read_text()
        (tmp_path / path.name).write_text(content.replace(old, new) if path.name == file else content)
    monkeypatch.setattr(settings_files, "TEMPLATES", tmp_path)
    with pytest.raises(RunError, match=text):
        settings_files.settings_texts("parts", 1, (256, 256))


@pytest.mark.parametrize(
    ("preset", "size"), [*((preset, (256, 256)) for preset in diffusion_presets.PRESETS), ("small", (96, 32))]
)
def test_a_size_of_the_diffusion_model_gives_settings_that_train_and_sample(preset, size, tmp_path):
    networks = settings_files.Networks(diffusion=preset)
    texts = settings_files.settings_texts("bolts", 3, size, settings_files.Told(images=30), networks)
    configs = {}
    for name in ("diffusion", "classifier", "sample"):
        (tmp_path / f"{name}.yaml").write_text(texts[f"{name}.yaml"])
        configs[name] = load_config(tmp_path / f"{name}.yaml")
    diffusion, classifier, sample = (configs[name] for name in ("diffusion", "classifier", "sample"))
    if preset == "small":
        # 3000 steps of 4 images are 400 epochs of 30 images, with 5 validations.
        assert diffusion.trainer.val_freq_epoch == 80
    with torch.device("meta"):
        unet = create_diffusion_unet(**model_kwargs(diffusion.unet))
        guide_size = classifier.dataset.crop or classifier.dataset.input_size
        create_classifier_unet(**model_kwargs(classifier.classifier), image_size=guide_size)
    millions = {"small": (4, 7), "medium": (50, 65), "paper": (550, 556)}[preset]
    assert millions[0] < sum(p.numel() for p in unet.parameters()) / 1e6 < millions[1]
    for config, mult in ((diffusion, diffusion.unet.channel_mult), (classifier, classifier.classifier.channel_mult)):
        check_training_size(config.dataset.input_size, config.dataset.crop, mult)
        assert config.TrainSampler.beta_scheduler == sample.TestSampler.beta_scheduler
    assert diffusion.dataset.crop == classifier.dataset.crop
    SpacedDiffusion(**sample.TestSampler)
    assert [sample.dataset.H, sample.dataset.W] == diffusion.dataset.input_size == list(size)


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_is_a_whole_file_and_its_values_reach_the_settings(preset, tmp_path):
    assert load_config(REPOSITORY / f"experiments/presets/{preset}.yaml", script="realnet").dataset.type == "parts"
    detector = settings_files.Networks(preset, "efficientnet_b0", 'C:\\my "w".pth', "half")
    told = settings_files.Told("auto", r"bolt\d+", {"bits": 12}, grey=True)
    texts = settings_files.settings_texts("bolts", 1, (96, 160), told, detector)
    assert yaml.safe_load(texts["sample.yaml"])["color_mode"] == "GRAY"
    reading = yaml.safe_load(texts["diffusion.yaml"])["dataset"]["image_reader"]["kwargs"]
    assert reading == {"image_dir": "data/bolts/images/", "color_mode": "GRAY", "bits": 12}
    text = texts["realnet.yaml"]
    assert yaml.safe_load(text)["dataset"]["train"]["parts"] == r"bolt\d+"
    (tmp_path / "realnet.yaml").write_text(text)
    config = load_config(tmp_path / "realnet.yaml", script="realnet")
    assert config.dataset.image_reader.kwargs.bits == 12
    assert config.dataset.input_size == [96, 160]
    assert (config.dataset.pixel_mean, config.dataset.pixel_std) == ([0.5] * 3, [0.5] * 3)
    assert config.evaluator.metrics.auc[0].kwargs.avgpool_size == [6, 10]
    assert config.structure[0].layers[0].idx == "features.3.0.block.0"
    assert config.net[0].kwargs == {"backbone": "efficientnet_b0", "weights": 'C:\\my "w".pth'}
    check_realnet(config)


def test_a_preset_without_a_place_for_a_value_is_named(tmp_path, monkeypatch):
    text = (PRESETS / "quick.yaml").read_text()
    (tmp_path / "quick.yaml").write_text(text.replace("foreground: none", "foreground: auto"))
    monkeypatch.setattr(settings_files, "PRESETS", tmp_path)
    with pytest.raises(RunError, match=r"quick.yaml: .*foreground: none\$ is missing"):
        settings_files.realnet_text("bolts", (96, 96), settings_files.Told("auto"), settings_files.Networks("quick"))


@pytest.mark.parametrize(
    "foreground", ["none", "auto", "MVTec-AD/bottle", "bottle", "{channel: gray, threshold: otsu, close: 6, open: 6}"]
)
def test_a_foreground_rule_is_written_as_given(foreground):
    assert settings_files.foreground_value(foreground, "parts") == foreground


@pytest.mark.parametrize(
    ("foreground", "text"),
    [
        ("bogus", "'bogus' is not none, auto"),
        ("7", "7 is not none, auto"),
        ("{channel: gray", "not readable as YAML"),
        ("{chanel: gray}", "chanel"),
        ("{channel: pink}", "'pink' is not gray, red, green or blue"),
        ("{threshold: 300}", "300 is not otsu, triangle or 0 .. 255"),
        ("{close: x}", "close"),
        ("{open: -3}", "open"),
        ("{open: 2.5}", "open"),
        ("{invert: maybe}", "invert"),
    ],
)
def test_a_foreground_that_training_cannot_read_is_refused_before_anything_is_written(
    foreground, text, tmp_path, prepare
):
    mvtec_class(tmp_path / "shots")
    err = prepare("--foreground", foreground, code=2)
    assert "--foreground" in err
    assert text in err
    assert len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shots"]
    with pytest.raises(UsageError, match="--foreground"):
        settings_files.foreground_value(foreground, "parts")


def test_the_printed_commands_quote_class_names(tmp_path, prepare):
    mvtec_class(tmp_path / "shots/metal nut $HOME")
    commands = [shlex.split(line) for line in prepare().splitlines() if line.startswith("  python train_realnet.py")]
    command = ["python", "train_realnet.py", "--dataset", "parts", "--class_name", "metal nut $HOME"]
    textures = ["--set", "dataset.train.anomaly_types={normal: 0.5, dtd: 0.2, cutpaste: 0.1, self: 0.1, noise: 0.1}"]
    diffusion = ["--set", "dataset.train.anomaly_types={normal: 0.5, sdas: 0.5}"]
    assert commands == [command, [*command, *textures], [*command, *diffusion]]
    assert yaml.safe_load((tmp_path / "experiments/parts/realnet.yaml").read_text())["dataset"]["foreground"] == "none"


@pytest.mark.parametrize("textures", [False, True])
def test_own_data_train_without_a_folder_of_textures_and_with_one(textures, tmp_path, prepare):
    mvtec_class(tmp_path / "shots/bolts")
    mvtec_class(tmp_path / "shots/nuts")
    if textures:
        image_file(tmp_path / "data/DTD/images/banded/banded_0001.jpg", "texture")
    out = prepare()
    assert (
        "training anomalies are made of the good images; textures in data/DTD/images would add a kind" in out
    ) != textures
    assert ("Or with textures too" in out) != textures
    for name in ("realnet.yaml", "realnet_unified.yaml"):
        train = yaml.safe_load((tmp_path / "experiments/parts" / name).read_text())["dataset"]["train"]
        assert ("dtd" in train["anomaly_types"]) == textures
        assert sum(train["anomaly_types"].values()) == pytest.approx(1)
    # As it stands, the file trains: what the types need is there.
    config = load_config(tmp_path / "experiments/parts/realnet.yaml", script="realnet")
    check_realnet_data(config.dataset, "bolts")


@pytest.mark.parametrize(("memory", "size"), [(23.6, "paper"), (7.7, "medium"), (5.8, "small"), (None, "small")])
def test_the_presets_go_with_the_device_and_are_told(memory, size, tmp_path, prepare, monkeypatch):
    card = SimpleNamespace(total_memory=(memory or 0) * 2**30)
    monkeypatch.setattr(prepare_data.torch.cuda, "is_available", lambda: memory is not None)
    monkeypatch.setattr(prepare_data.torch.cuda, "get_device_properties", lambda index: card)
    mvtec_class(tmp_path / "shots")
    out = prepare()
    preset, why = ("standard", "there is a GPU") if memory else ("quick", "there is no GPU")
    assert f"realnet.yaml: preset {preset} ({why}); --preset and --backbone choose others" in out
    why = f"the GPU has {memory:.0f} GiB" if memory else "there is no GPU"
    assert f"diffusion.yaml, sample.yaml: {size} ({why}); --diffusion chooses another size" in out
    text = (tmp_path / "experiments/parts/realnet.yaml").read_text()
    assert text.startswith("# realnet.yaml of parts")
    assert f"Preset {preset}." in text


def test_a_folder_without_any_mask_is_one_finding(prepare, tmp_path):
    mvtec_class(tmp_path / "shots")
    for i in range(3):
        image_file(tmp_path / f"shots/test/bent/{i}.png", f"bent{i}")
        image_file(tmp_path / f"shots/test/crack/more{i}.png", f"crack{i}")
    out = prepare()
    assert out.count("without a mask: ") == 2, out
    assert "test/bent: none of its 3 images has a mask" in out
    assert "test/crack: 3 of its 5 images have no mask: more0.png, more1.png, more2.png, ..." in out
