import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datasets.images import Augmentation, SharedCache, normalize, read_image, read_mask, read_size
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


def test_color_modes(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", color_mode="BGR"), gradient()[..., ::-1])
    grey = read_image(tmp_path / "a.png", color_mode="GRAY")
    assert np.ptp(grey, axis=2).max() == 0


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
