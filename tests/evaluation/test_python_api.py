"""The detector in a Python program: what it takes, what it gives, and what it refuses."""

import doctest
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datasets.given_images import from_array, from_pillow
from datasets.images import read_image
from evaluation.detector import Detector
from tests.conftest import REPOSITORY
from tests.layout_trees import image_file
from utils.errors import RunError, UsageError

CLASS_FOLDER = "experiments/tiny/predict_checkpoints/dots"
TEST_FOLDER = "data/tiny/images/dots/test"


@pytest.fixture(scope="module")
def loaded(detector) -> Detector:
    return Detector.load(detector.root / CLASS_FOLDER, device="cpu")


@pytest.fixture
def image_path(detector):
    return detector.root / TEST_FOLDER / "spot/000.png"


def test_the_example_in_the_detector_s_docstring_runs(detector, monkeypatch):
    monkeypatch.chdir(detector.root)
    names = {"Detector": Detector, "np": np, "Image": Image, "checkpoints": CLASS_FOLDER}
    names["image_path"] = f"{TEST_FOLDER}/spot/000.png"
    example = doctest.DocTestFinder().find(Detector, "Detector", globs=names)[0]
    result = doctest.DocTestRunner().run(example)
    assert (result.attempted, result.failed) == (6, 0)


@pytest.mark.parametrize("page", ["README.md", "README_CN.md", "docs/deployment.md"])
def test_the_example_in_the_docs_runs(page, detector, monkeypatch, capsys):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    several = page == "docs/deployment.md"
    places = {"experiments/demo/realnet_checkpoints/gravel": CLASS_FOLDER}
    places |= {"new_images": f"{TEST_FOLDER}/spot"} if several else {"image.png": f"{TEST_FOLDER}/spot/000.png"}
    for name, place in places.items():
        assert name in example
        example = example.replace(name, place)
    monkeypatch.chdir(detector.root)
    names = {}
    exec(example, names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("score 0.")
    assert "map (64, 64)" in lines[0]
    if not several:
        assert len(lines) == 1
        return
    found = [names["detector"](path) for path in names["paths"]]
    flagged = [path.name for path, result in zip(names["paths"], found, strict=True) if result.is_anomalous]
    assert [line.partition(":")[0] for line in lines[1:]] == flagged


# ---- what equals what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_a_path_its_pillow_image_and_its_array_have_the_same_score(suffix, loaded, tmp_path):
    path = image_file(tmp_path / f"x.{suffix}", 3, (70, 50))
    opened = Image.open(path)
    array = np.asarray(opened.convert("RGB"))
    alike = [str(path), opened, array, array[..., [0, 1, 2, 0]], array / 255, (array / 255).astype(np.float32)]
    alike += [array.astype(np.uint16) * 256, np.asfortranarray(array), array.astype(">u2") * 256]
    expected = loaded(path)
    for other in alike:
        found = loaded(other)
        assert found.score == expected.score
        np.testing.assert_array_equal(found.map, expected.map)


@pytest.mark.parametrize("grey", [False, True], ids=["RGB model", "grey model"])
@pytest.mark.parametrize("bits", [None, 12])
def test_grey_files_of_8_and_16_bits_are_what_their_arrays_are(grey, bits, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (40, 30)).astype(np.uint16) << (0 if bits else 4)
    for array in ((values >> 8).astype(np.uint8), values):
        for suffix in ("png", "tif"):
            path = tmp_path / f"x.{suffix}"
            Image.fromarray(array).save(path)
            expected = read_image(path, grey=grey, bits=bits)
            np.testing.assert_array_equal(from_array(array, grey, bits), expected)
            np.testing.assert_array_equal(from_array(array[..., None], grey, bits), expected)
            np.testing.assert_array_equal(from_pillow(Image.open(path), grey, bits), expected)


def test_colours_of_16_bits_are_what_their_array_is(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (40, 30, 3)).astype(np.uint16)
    path = tmp_path / "x.png"
    cv2.imwrite(str(path), values[..., ::-1])
    for grey in (False, True):
        np.testing.assert_array_equal(from_array(values, grey), read_image(path, grey=grey))
        np.testing.assert_array_equal(from_pillow(Image.open(path), grey), read_image(path, grey=grey))
        np.testing.assert_array_equal(from_array(values >> 4, grey, 12), read_image(path, grey=grey, bits=16))
    # Pillow has already dropped the bits that the camera fills.
    with pytest.raises(UsageError, match=r"x\.png: Pillow gives 8 bits of its 16-bit colours; pass the path"):
        from_pillow(Image.open(path), bits=12)


def test_a_grey_model_sees_colour_arrays_as_it_sees_their_files(tmp_path):
    path = image_file(tmp_path / "x.png", 3, (70, 50))
    array, expected = np.asarray(Image.open(path).convert("RGB")), read_image(path, grey=True)
    np.testing.assert_array_equal(from_array(array, grey=True), expected)
    np.testing.assert_array_equal(from_pillow(Image.open(path), grey=True), expected)


def test_pillow_images_are_turned_upright_as_their_files_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image_file(tmp_path / "x.png", 3, (70, 50))
    Image.open(tmp_path / "x.png").convert("RGB").save(tmp_path / "x.jpg", exif=exif)
    expected = read_image(tmp_path / "x.jpg")
    np.testing.assert_array_equal(from_pillow(Image.open(tmp_path / "x.jpg")), expected)
    assert expected.shape != np.asarray(Image.open(tmp_path / "x.jpg")).shape


def test_the_limit_of_the_model_s_settings_holds_for_files(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    content = torch.load(detector.root / CLASS_FOLDER / "ckpt_best.pth.tar", weights_only=True)
    content["config"]["dataset"]["image_reader"]["kwargs"]["max_megapixels"] = 1
    torch.save(content, tmp_path / "small.pth.tar")
    limited = Detector.load(tmp_path / "small.pth.tar", device="cpu")
    Image.new("L", (1500, 1000)).save(tmp_path / "large.png")
    with pytest.raises(UsageError, match=r"large\.png has 1\.5 megapixels, above the limit of 1"):
        limited(tmp_path / "large.png")


# ---- many ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pth.tar", "onnx", "pt2"])
def test_many_images_give_what_each_one_gives(ending, loaded, detector, request):
    one_by_one = loaded
    if ending != "pth.tar":
        loaded = Detector.load(request.getfixturevalue("exported") / f"model.{ending}", device="cpu")
    paths = sorted((detector.root / TEST_FOLDER).rglob("*.png"))
    images = [paths[0], np.asarray(Image.open(paths[1])), Image.open(paths[2]), *paths[3:]]
    found = list(loaded.predict_many(iter(images), batch_size=3))
    assert len(found) == len(paths) == 8
    for path, detection in zip(paths, found, strict=True):
        expected = one_by_one(path)
        assert detection.score == pytest.approx(expected.score, abs=1e-5)
        assert detection.is_anomalous == expected.is_anomalous
        assert detection.mask.shape == detection.map.shape == (64, 64)
        np.testing.assert_allclose(detection.map, expected.map, atol=1e-4)


def test_an_array_of_many_images_is_many(loaded):
    rng = np.random.default_rng(0)
    assert [found.map.shape for found in loaded.predict_many(rng.random((3, 40, 50)))] == [(40, 50)] * 3
    assert len(list(loaded.predict_many(rng.integers(0, 255, (2, 40, 50, 3), np.uint8), batch_size=1))) == 2


def test_images_are_taken_as_their_results_are_asked_for(loaded):
    taken = []

    def camera():
        for i in range(1000):
            taken.append(i)
            yield np.zeros((32, 32), np.uint8)

    results = loaded.predict_many(camera(), batch_size=1)
    assert not taken
    for i in range(3):
        next(results)
        assert taken == list(range(i + 1))
    results = loaded.predict_many(camera(), batch_size=4)
    taken.clear()
    next(results)
    assert 4 <= len(taken) <= 4 + 8


def test_the_results_before_a_broken_image_come_first(loaded, image_path, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    results = loaded.predict_many([image_path, image_path, tmp_path / "broken.png", image_path], batch_size=4)
    assert next(results).score == next(results).score
    with pytest.raises(UsageError, match=r"image 2: .*broken\.png is not a readable image"):
        next(results)


def test_a_result_that_is_not_finite_is_named(loaded):
    def infer(images):
        return np.where(images[:, 0] > 2, np.nan, 0.5).astype(np.float32)

    broken = Detector(loaded.config, loaded.thresholds, infer)
    dark, bright = np.zeros((64, 64), np.uint8), np.full((64, 64), 255, np.uint8)
    results = broken.predict_many([dark, bright, dark])
    assert next(results).score == 0.5
    with pytest.raises(RunError, match="image 1: the model's weights, score or anomaly map"):
        next(results)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"has to be \(H,W\), \(H,W,3\) or \(H,W,4\).* this one is \(4, 4, 2\)"),
        (np.zeros(16, np.uint8), r"this one is \(16,\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"this one is \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "not empty"),
        (np.zeros((4, 4), np.int32), "uint8, uint16, or floats in .* this one is int32"),
        (np.zeros((4, 4), bool), "this one is bool"),
        (np.full((4, 4), "x"), "this one is <U1"),
        (np.full((4, 4), np.nan), "holds values that are not finite"),
        (np.array([[0.5, np.nan]]), "holds values that are not finite"),
        (np.full((4, 4), np.inf, np.float32), "holds values that are not finite"),
        (np.full((4, 4), 128.0), "values from 128 to 128"),
        (np.full((4, 4), -0.1), "values from -0.1 to -0.1"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "the image holds floating-point values"),
        ("gone.png", "gone.png does not exist"),
        ([], "not list; several images go to predict_many"),
        (None, "an image is a path, a Pillow image or a numpy array, not NoneType"),
    ],
)
def test_what_is_no_image_is_refused(image, says, loaded):
    with pytest.raises(UsageError, match=says):
        loaded(image)


def test_a_cut_pillow_image_is_refused(loaded, image_path, tmp_path):
    (tmp_path / "cut.png").write_bytes(image_path.read_bytes()[:-200])
    with pytest.raises(UsageError, match=r"cut\.png is not a readable image"):
        loaded(Image.open(tmp_path / "cut.png"))


def test_one_image_is_not_many(loaded, image_path):
    for image in (str(image_path), image_path, Image.open(image_path), np.zeros((9, 9)), np.zeros((9, 9, 3))):
        with pytest.raises(UsageError, match=r"this is one; call detector\(image\)"):
            loaded.predict_many(image)
    with pytest.raises(UsageError, match="batch_size 0: at least 1"):
        loaded.predict_many([image_path], batch_size=0)
    for nothing in ([], iter(()), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(UsageError, match="got no image"):
            list(loaded.predict_many(nothing))
    with pytest.raises(UsageError, match=r"image 0: an image is a path, .* not NoneType"):
        list(loaded.predict_many([None]))


def test_what_cannot_be_loaded_is_named(detector, tmp_path):
    with pytest.raises(UsageError, match=r"gone\.pth\.tar does not exist"):
        Detector.load(tmp_path / "gone.pth.tar")
    shutil.copy(detector.root / TEST_FOLDER / "spot/000.png", tmp_path / "image.onnx")
    pytest.importorskip("onnxruntime")
    with pytest.raises(UsageError, match=r"image\.onnx is not a model that export\.py wrote"):
        Detector.load(tmp_path / "image.onnx")
