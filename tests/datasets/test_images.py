import logging
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datasets.build import preprocessing_of
from datasets.images import (
    Augmentation,
    Preprocessing,
    SharedCache,
    count_pages,
    list_images,
    normalize,
    read_image,
    read_mask,
    read_size,
)
from datasets.synthesis import Synthesis
from utils.config import load_config
from utils.errors import UsageError


def gradient(height=40, width=60):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(20, 30), (64, 64), (17, 91)])
def test_resize_equals_pillows_antialiased_bilinear(tmp_path, size):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(gradient()).resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=None))
    got = read_image(tmp_path / "a.png", size)
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_formats_become_rgb(tmp_path):
    image = Image.fromarray(gradient())
    grey = image.convert("L")
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 256).save(tmp_path / "deep.png")
    for name in ("palette.png", "alpha.png", "cmyk.jpg", "grey.png", "deep.png"):
        read = read_image(tmp_path / name)
        assert read.shape == (40, 60, 3), name
        assert read.dtype == np.uint8, name
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), gradient())
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), read_image(tmp_path / "grey.png"))


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(gradient(), -1))


def test_color_modes_change_what_the_network_gets_and_not_the_pictures(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    size, half = gradient().shape[:2], (0.5, 0.4, 0.3)
    rgb, bgr, grey = (Preprocessing(size, half, half, mode) for mode in ("RGB", "BGR", "GRAY"))
    for preprocessing in (rgb, bgr):
        image = preprocessing.read(tmp_path / "a.png")
        np.testing.assert_array_equal(image, gradient())
        np.testing.assert_array_equal(preprocessing.pictures(preprocessing.tensor(image)[None].numpy())[0], image)
    torch.testing.assert_close(bgr.tensor(gradient()), rgb.tensor(gradient()[..., ::-1].copy()))
    assert np.ptp(grey.read(tmp_path / "a.png"), axis=2).max() == 0


@pytest.mark.parametrize("ending", ["eps", "ppm", "ico"])
def test_other_formats_than_those_of_photographs_are_not_decoded(ending, tmp_path, monkeypatch):
    Image.fromarray(gradient()).save(tmp_path / f"a.{ending}")
    (tmp_path / f"a.{ending}").rename(tmp_path / "a.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was called"))
    with pytest.raises(UsageError, match="not PNG, JPEG"):
        read_image(tmp_path / "a.png")


def test_masks_are_anomalous_above_zero_and_resized_by_nearest_neighbour(tmp_path):
    values = np.zeros((8, 8), np.uint8)
    values[2:4, 2:4] = 3  # VisA's masks hold small numbers
    Image.fromarray(values).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), values > 0)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", (4, 4)), (values > 0)[::2, ::2])
    doubled = read_mask(tmp_path / "m.png", (16, 16))
    np.testing.assert_array_equal(doubled, np.kron(values > 0, np.ones((2, 2))))


def test_masks_in_any_mode(tmp_path):
    truth = np.zeros((16, 16), bool)
    truth[4:9, 5:12] = True
    grey = Image.fromarray(truth.astype(np.uint8) * 255)
    grey.save(tmp_path / "l.png")
    grey.convert("1").save(tmp_path / "1.bmp")
    grey.convert("LA").save(tmp_path / "la.png")
    grey.convert("P").save(tmp_path / "p.PNG")
    grey.convert("RGB").save(tmp_path / "rgb.tif")
    grey.save(tmp_path / "l.jpg", quality=60)
    Image.fromarray(truth.astype(np.uint16) * 300).save(tmp_path / "deep.png")
    # Red on transparent white, as annotation tools write it.
    painted = np.full((16, 16, 4), (255, 255, 255, 0), np.uint8)
    painted[truth] = (255, 0, 0, 255)
    Image.fromarray(painted).save(tmp_path / "rgba.png")
    for path in sorted(tmp_path.iterdir()):
        mask = read_mask(path)
        assert mask.dtype == np.uint8, path.name
        assert np.mean(mask == truth) >= (0.97 if path.suffix == ".jpg" else 1), path.name


def test_read_size_gives_the_size_of_the_upright_image(tmp_path):
    Image.fromarray(gradient(40, 60)).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(40, 60)).save(tmp_path / "b.jpg", exif=exif)
    assert read_size(tmp_path / "a.png") == read_image(tmp_path / "a.png").shape[:2] == (40, 60)
    assert read_size(tmp_path / "b.jpg") == read_image(tmp_path / "b.jpg").shape[:2] == (60, 40)


def test_sixteen_bit_colour_and_floating_point(tmp_path):
    deep = gradient().astype(np.uint16)[..., ::-1] * 257
    for name in ("a.png", "a.tif"):
        assert cv2.imwrite(str(tmp_path / name), deep)
        np.testing.assert_array_equal(read_image(tmp_path / name), gradient())
    assert cv2.imwrite(str(tmp_path / "f.tif"), gradient()[..., 0].astype(np.float32))
    with pytest.raises(UsageError, match=r"f\.tif holds floating-point values"):
        read_image(tmp_path / "f.tif")


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_images_are_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:
        Image.fromarray(gradient()).save(path)
        content = path.read_bytes()[:200]
    path.write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(UsageError, match=r"broken\.png"):
            read(path)


def test_normalize_equals_its_formula():
    image = gradient(3, 4)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (image / 255.0 - mean) / std
    np.testing.assert_allclose(normalize(image, mean, std).numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_flips_and_turns_are_the_same_for_all_arrays():
    image = gradient(5, 7)
    for seed in range(10):
        a, b = Augmentation(True, True, True)([image, image[..., 0]], np.random.default_rng(seed))
        np.testing.assert_array_equal(a[..., 0], b)
        assert a.shape == image.shape


def test_cache_stays_within_its_budget():
    cache = SharedCache(10, (512, 1024, 1), 2)
    assert cache.kept == 4
    item = np.full((512, 1024, 1), 7, np.uint8)
    for index in (0, 9):
        assert cache.get(index) is None
        cache.put(index, item)
    np.testing.assert_array_equal(cache.get(0), item)
    assert cache.get(9) is None


def _put_in_worker(rank, cache):
    cache.put(3, np.full((4, 4), rank + 5, np.uint8))


def test_cache_is_shared_with_other_processes():
    cache = SharedCache(5, (4, 4), 1)
    torch.multiprocessing.spawn(_put_in_worker, (cache,), nprocs=1)
    np.testing.assert_array_equal(cache.get(3), np.full((4, 4), 5))


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16, None])
def test_bits_of_grey_and_colour_in_16_bit_files(bits, tmp_path):
    used = bits or 16
    deep = gradient().astype(np.uint16) << (used - 8)
    deep += (1 << (used - 8)) - 1
    assert cv2.imwrite(str(tmp_path / "grey.png"), deep[..., 0])
    assert cv2.imwrite(str(tmp_path / "grey.tif"), deep[..., 0])
    assert cv2.imwrite(str(tmp_path / "colour.png"), deep[..., ::-1])
    assert cv2.imwrite(str(tmp_path / "colour.tif"), deep[..., ::-1])
    assert cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([deep[..., ::-1], deep[..., 0]]))
    Image.fromarray(gradient()).save(tmp_path / "eight.png")
    for name in ("colour.png", "colour.tif", "alpha.png", "eight.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name, bits=bits), gradient(), err_msg=name)
    for name in ("grey.png", "grey.tif"):
        np.testing.assert_array_equal(read_image(tmp_path / name, bits=bits)[..., 1], gradient()[..., 0], err_msg=name)


def test_values_above_the_bits_are_white(tmp_path):
    assert cv2.imwrite(str(tmp_path / "a.png"), np.full((4, 4), 5000, np.uint16))
    assert read_image(tmp_path / "a.png", bits=12).min() == 255
    assert read_image(tmp_path / "a.png").max() == 5000 // 256


def tiff_with_orientation(values, orientation):
    """A TIFF of 16-bit colours (H,W,3), which Pillow cannot write."""
    height, width = values.shape[:2]
    count, data = 11, values.astype("<u2").tobytes()
    extra = 8 + 2 + 12 * count + 4
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, extra), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, extra + 6), (274, 3, 1, orientation), (277, 3, 1, 3), (278, 3, 1, height)]
    tags += [(279, 4, 1, len(data)), (284, 3, 1, 1)]
    directory = struct.pack("<H", count) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<HHH", 16, 16, 16) + data


def png_with_orientation(values, orientation):
    """A PNG of 16-bit colours (H,W,3) with EXIF data, which OpenCV cannot write."""
    encoded = cv2.imencode(".png", values[..., ::-1])[1].tobytes()
    chunk = b"eXIfII*\0" + struct.pack("<IHHHIII", 8, 1, 274, 3, 1, orientation, 0)
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return encoded[:33] + chunk + encoded[33:]  # after the header


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_16_bit_colours_are_turned_upright(orientation, tmp_path):
    deep = gradient().astype(np.uint16) << 4
    (tmp_path / "a.tif").write_bytes(tiff_with_orientation(deep, orientation))
    (tmp_path / "a.png").write_bytes(png_with_orientation(deep, orientation))
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(read_image(tmp_path / name, bits=12), np.rot90(gradient(), turns), err_msg=name)
        assert read_size(tmp_path / name) == np.rot90(gradient(), turns).shape[:2]


def test_bits_are_a_setting_of_8_to_16():
    path = "experiments/demo/realnet.yaml"
    assert preprocessing_of(load_config(path).dataset).bits is None
    key = "dataset.image_reader.kwargs.bits"
    assert preprocessing_of(load_config(path, [f"{key}=12"]).dataset).bits == 12
    for value in ("7", "17", "many"):
        with pytest.raises(UsageError, match="bits"):
            load_config(path, [f"{key}={value}"])


def test_pages_are_counted(tmp_path):
    image = Image.fromarray(gradient())
    image.save(tmp_path / "one.tif")
    image.save(tmp_path / "three.tif", save_all=True, append_images=[image, image.rotate(90)])
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    assert [count_pages(tmp_path / f"{name}.tif") for name in ("one", "three", "broken", "gone")] == [1, 3, 1, 1]
    np.testing.assert_array_equal(read_image(tmp_path / "three.tif"), gradient())


# ---- source images of anomalies --------------------------------------------------------------------------------------


@pytest.fixture
def messages():
    """What is logged, as a list that grows."""
    texts, logger, handler = [], logging.getLogger("realnet"), logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


def source_folder(tmp_path, good=3):
    folder = tmp_path / "sources"
    folder.mkdir()
    for i in range(good):
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(folder / f"good{i}.png")
    for name, content in (("empty.jpg", b""), ("text.png", b"no image"), ("b.gif", b"GIF89a")):
        (folder / name).write_bytes(content)
    (folder / "gone.png").symlink_to("nowhere")
    return folder


def test_broken_source_images_are_named_and_left_out(tmp_path, messages):
    folder = source_folder(tmp_path)
    for types, where in (({"dtd": 1.0}, {"dtd_dir": str(folder)}), ({"sdas": 1.0}, {"sdas_dir": f"{tmp_path}/{{}}"})):
        synthesis = Synthesis(types, **where)
        messages.clear()
        synthesis.open(["sources"])
        assert not messages
        synthesis.open(["sources"], tell=True)
        (paths,) = synthesis.sources.values()
        assert [path.name for path in paths] == ["good0.png", "good1.png", "good2.png"]
        first, second = messages
        assert first.startswith(f"dataset.train.{next(iter(where))}: 3 of 6 images cannot be read and are left out:")
        for name in ("empty.jpg", "gone.png", "text.png"):
            assert str(folder / name) in first
        assert second.endswith("1 file was not read: .gif")


def test_only_broken_source_images_are_refused(tmp_path):
    folder = source_folder(tmp_path, good=0)
    with pytest.raises(UsageError, match=r"dataset\.train\.dtd_dir: no image in .*sources can be read \(.*empty\.jpg"):
        Synthesis({"dtd": 1.0}, dtd_dir=str(folder)).open([])
    for path in list_images(folder):
        path.unlink()
    with pytest.raises(UsageError, match=r"holds no image \(1 file was not read: \.gif\)"):
        Synthesis({"dtd": 1.0}, dtd_dir=str(folder)).open([])


@pytest.mark.parametrize("kind", ["dtd", "sdas"])
def test_a_source_image_that_breaks_later_is_replaced_by_the_next(kind, tmp_path, messages):
    folder = tmp_path / "part"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(gradient(64, 64) // (i + 1)).save(folder / f"{i}.png")
    # Its header is intact.
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:5000])
    preprocessing = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3)
    types, places = {kind: 1.0}, {"dtd_dir": str(folder), "sdas_dir": f"{tmp_path}/{{}}"}
    synthesis = Synthesis(types, **places)
    synthesis.open(["part"])
    (paths,) = synthesis.sources.values()
    assert len(paths) == 3
    drawn = [synthesis.draw_source(kind, "part", preprocessing, np.random.default_rng(seed))[0] for seed in range(12)]
    again = [synthesis.draw_source(kind, "part", preprocessing, np.random.default_rng(seed))[0] for seed in range(12)]
    np.testing.assert_array_equal(drawn, again)
    assert len({image.tobytes() for image in drawn}) >= 2
    assert [message.endswith("the next image is used instead") for message in messages] == [True]
    assert str(folder / "1.png") in messages[0]
    for path in paths:
        path.unlink()
    with pytest.raises(UsageError, match="are they still there"):
        synthesis.draw_source(kind, "part", preprocessing, np.random.default_rng(0))


def test_sources_behind_links_are_found(tmp_path):
    folder = source_folder(tmp_path)
    (tmp_path / "textures").mkdir()
    (tmp_path / "textures/linked").symlink_to(folder)
    (folder / "loop").symlink_to(tmp_path / "textures")
    synthesis = Synthesis({"dtd": 1.0}, dtd_dir=str(tmp_path / "textures"))
    synthesis.open([])
    assert [path.name for path in synthesis.sources["dtd"]] == ["good0.png", "good1.png", "good2.png"]
