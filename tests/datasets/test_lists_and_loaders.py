import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from datasets.build import sdas_reading
from datasets.images import Augmentation, Preprocessing, SharedCache
from datasets.lists import ImageList, Sample, chosen_classes, class_names, listed_classes, read_list, write_list
from datasets.loaders import EpochBatches, SharedBatches, make_loader
from datasets.realnet import RealNetTestSet
from datasets.sdas import SDASDataset
from tests.conftest import REPOSITORY, settings
from utils.distributed import Run
from utils.errors import UsageError

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3)


def test_lists_survive_a_round_trip(tiny_data):
    path = tiny_data / "samples" / "test_dots.json"
    samples = read_list(path, tiny_data / "images")
    write_list(path, samples)
    assert read_list(path, tiny_data / "images") == samples
    assert [sample.label for sample in samples] == [0] * 4 + [1] * 4
    assert samples[-1].defect_type == "spot"
    assert json.loads(path.read_text().splitlines()[-1])["label_name"] == "defective"


def test_class_is_the_fourth_part_of_the_path_from_the_right(tiny_data):
    path = tiny_data / "list.json"
    path.write_text('{"filename": "dots/train/good/000.png", "label": 0}\n\n')
    assert class_names(read_list(path, tiny_data / "images")) == ["dots"]


def test_the_mask_of_a_defect_without_a_mask_file_is_unknown():
    assert Sample("a/test/good/0.png", 0, "a").mask_known
    assert not Sample("a/test/bad/0.png", 1, "a").mask_known
    assert Sample("a/test/bad/0.png", 1, "a", "m.png").mask_known


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "JSON"),
        ("[]", "filename"),
        ('{"label": 0}', "filename"),
        ('{"filename": "dots/train/good/000.png"}', "label"),
        ('{"filename": "dots/train/good/000.png", "label": 2}', "label is 2"),
        ('{"filename": "dots/train/good/nope.png", "label": 0}', r"nope\.png does not exist"),
        ('{"filename": "../samples/x.png", "label": 0, "clsname": "dots"}', "lies outside"),
        ('{"filename": "/etc/hostname", "label": 0, "clsname": "dots"}', "lies outside"),
        ('{"filename": "a.png", "label": 0}', "clsname"),
        ('{"filename": "dots/train/good/000.png", "label": 1, "maskname": "no.png"}', r"no\.png does not exist"),
    ],
)
def test_a_bad_line_is_named(tiny_data, line, match):
    path = tiny_data / "list.json"
    path.write_text('{"filename": "dots/train/good/000.png", "label": 0}\n' + line + "\n")
    with pytest.raises(UsageError, match=match) as error:
        read_list(path, tiny_data / "images")
    assert f"{path}, line 2" in str(error.value)


def test_lists_with_backslashes_are_read(tiny_data):
    path = tiny_data / "list.json"
    first = {"filename": "dots\\train\\good\\000.png", "label": 0}
    second = {"filename": "dots\\test\\spot\\000.png", "label": 1, "maskname": "dots\\ground_truth\\spot\\000_mask.png"}
    path.write_text(f"{json.dumps(first)}\r\n{json.dumps(second)}\r\n")
    assert read_list(path, tiny_data / "images") == [
        Sample("dots/train/good/000.png", 0, "dots"),
        Sample("dots/test/spot/000.png", 1, "dots", "dots/ground_truth/spot/000_mask.png"),
    ]
    path.write_text(json.dumps(first) + "\n" + '{"filename": "dots/train/good/000.png", "label": 0}')
    with pytest.raises(UsageError, match=r"line 2: dots/train/good/000\.png is already in line 1"):
        read_list(path, tiny_data / "images")
    path.write_text('{"filename": "dots\\good\\000.png", "label": 0}')
    with pytest.raises(UsageError, match=r"line 1: not a JSON object \(.*write / or"):
        read_list(path, tiny_data / "images")


@pytest.mark.skipif(os.sep == "\\", reason="no such file names on Windows")
def test_a_backslash_in_a_file_name_stays(tiny_data):
    (tiny_data / "images/dots/train/good/000.png").rename(tiny_data / "images/dots/a\\b.png")
    path = tiny_data / "list.json"
    path.write_text(json.dumps({"filename": "dots/a\\b.png", "label": 0, "clsname": "dots"}))
    assert read_list(path, tiny_data / "images")[0].filename == "dots/a\\b.png"


def test_a_moved_image_folder_is_named(tiny_data, tmp_path):
    place = tmp_path / "moved away/images"
    (tmp_path / "link").symlink_to(place, target_is_directory=True)
    with pytest.raises(UsageError) as error:
        read_list(tiny_data / "samples/train_dots.json", tmp_path / "link")
    assert f"{tmp_path / 'link'} is a link to {place}, which is gone; run prepare_data.py" in str(error.value)
    assert "train_dots.json, line 1: " in str(error.value)
    with pytest.raises(UsageError) as error:
        read_list(tiny_data / "samples/train_dots.json", tmp_path)
    assert "link" not in str(error.value)


def test_a_defective_image_outside_of_all_folders_is_not_called_good():
    assert Sample("bad_0.png", 1, "parts").defect_type == "defective"
    assert Sample("good_0.png", 0, "parts").defect_type == "good"


def test_listed_classes_follow_the_pattern(tiny_data):
    assert listed_classes(f"{tiny_data}/samples/train_{{}}.json") == ["dots", "lines"]
    assert listed_classes(f"{tiny_data}/samples/train_uni.json") == []


# ---- loaders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lists_of(tmp_path):
    """lists_of(class, ...): the path of training lists of these classes and of all, with {} for the class."""

    def write(*classes: str) -> str:
        for name in (*classes, "uni"):
            (tmp_path / f"train_{name}.json").write_text("")
        return str(tmp_path / "train_{}.json")

    return write


def test_the_only_class_needs_no_name_and_the_list_of_all_classes_is_no_class(lists_of):
    assert chosen_classes(None, lists_of("bolts")) == ["bolts"]
    with pytest.raises(UsageError, match=r"realnet_unified\.yaml"):
        chosen_classes("uni", lists_of("bolts"))
    with pytest.raises(UsageError, match="--class_name is missing"):
        chosen_classes(None, lists_of("bolts", "nuts"))


def test_a_class_is_refused_where_one_model_serves_all(lists_of):
    unified = lists_of("bolts").replace("{}", "uni")
    for wanted in (None, "all", "uni"):
        assert chosen_classes(wanted, unified) == ["uni"]
    with pytest.raises(UsageError, match=r"--class_name bolts: one model serves all .*train_uni\.json.*leave it out"):
        chosen_classes("bolts", unified)


@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 2), (11, 2), (7, 3)])
def test_training_batches_cover_every_sample_evenly(length, world):
    ranks = [EpochBatches(length, 3, Run(rank, world, CPU), seed=1) for rank in range(world)]
    seen = [list(batches) for batches in ranks]
    assert [len(batches) for batches in ranks] == [len(batches) for batches in seen]
    assert len({len(batches) for batches in seen}) == 1
    indices = [index for batches in seen for batch in batches for _, index in batch]
    assert set(indices) == set(range(length))
    assert {len(batch) for batches in seen for batch in batches} == {3}
    assert len(indices) < length + 3 * world


def test_the_last_batch_is_filled_from_the_head_of_the_epoch():
    """bottle has 209 = 13 x 16 + 1 images; a last batch of one would fill BatchNorm's running statistics."""
    batches = EpochBatches(209, 16, Run(0, 1, CPU), seed=1)
    seen = [[index for _, index in batch] for batch in batches]
    assert [len(batch) for batch in seen] == [16] * 14
    assert sorted([index for batch in seen for index in batch][:209]) == list(range(209))
    assert seen[-1][1:] == seen[0][:15]
    batches.set_epoch(0, skip=13)
    assert [[index for _, index in batch] for batch in batches] == seen[13:]
    assert len(batches) == 1
    batches.set_epoch(0, skip=14)
    assert list(batches) == []
    assert len(batches) == 0


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_few_samples_make_one_batch_in_which_none_is_twice(length, world):
    ranks = [
        [[i for _, i in batch] for batch in EpochBatches(length, 4, Run(r, world, CPU), seed=1)] for r in range(world)
    ]
    assert {len(batches) for batches in ranks} == {1 if length < 5 or world > 1 else 2}
    sizes = {len(batch) for batches in ranks for batch in batches}
    assert sizes == {4 if length >= 4 else -(-length // world)}
    assert all(len(set(batch)) == len(batch) for batches in ranks for batch in batches)
    assert {index for batches in ranks for batch in batches for index in batch} == set(range(length))


def test_no_more_workers_than_usable_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    run = Run(0, 1, CPU)
    assert make_loader(list(range(8)), SharedBatches(8, 2, run), 8, run).num_workers == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert make_loader(list(range(8)), SharedBatches(8, 2, run), 100, run).num_workers == 64


def test_training_batches_are_shuffled_again_in_each_epoch():
    batches = EpochBatches(20, 4, Run(0, 1, CPU), seed=1)
    first = list(batches)
    assert first == list(batches)
    batches.set_epoch(1)
    assert [i for b in first for _, i in b] != [i for b in batches for _, i in b]
    assert {epoch for b in batches for epoch, _ in b} == {1}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_test_batches_are_the_same_for_any_number_of_ranks(world):
    ranks = [list(SharedBatches(10, 4, Run(rank, world, CPU))) for rank in range(world)]
    together = sorted(batch for batches in ranks for batch in batches)
    assert together == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_any_number_of_workers_gives_the_same_samples(tiny_data):
    samples = read_list(tiny_data / "samples" / "train_uni.json", tiny_data / "images")
    seen = []
    for workers in (0, 1, 2):
        images, augmentation = ImageList(samples, tiny_data / "images"), Augmentation(True, True, True)
        dataset = SDASDataset(images, ["dots", "lines"], PREPROCESSING, augmentation, seed=3, cache_mb=1)
        batches = EpochBatches(len(dataset), 4, Run(0, 1, CPU), seed=1)
        loader = make_loader(dataset, batches, workers, Run(0, 1, CPU))
        epochs = []
        for epoch in range(2):
            batches.set_epoch(epoch)
            epochs += [batch["image"] for batch in loader]
        seen.append(torch.cat(epochs))
        assert dataset.cache.filled.all()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert -1 <= seen[0].min() < seen[0].max() <= 1
    # The second epoch has other augmentations.
    assert not torch.equal(seen[0][:16].sort(dim=0).values, seen[0][16:].sort(dim=0).values)


def test_crops_are_parts_of_the_images_and_lie_elsewhere_in_each_epoch(tiny_data):
    samples = read_list(tiny_data / "samples" / "train_uni.json", tiny_data / "images")
    images = ImageList(samples, tiny_data / "images")
    whole, random, centred = (
        SDASDataset(images, ["dots", "lines"], PREPROCESSING, Augmentation(), seed=3, crop=crop, centred=centred)
        for crop, centred in ((None, False), ((8, 12), False), ((8, 12), True))
    )
    image = whole[0, 1]["image"]
    height, width = image.shape[1:]
    parts = {epoch: random[epoch, 1]["image"] for epoch in range(8)}
    windows = image.unfold(1, 8, 1).unfold(2, 12, 1).movedim(0, 2)  # (rows, columns, 3, 8, 12)
    for part in parts.values():
        assert (windows == part).all(dim=4).all(dim=3).all(dim=2).any()
    assert len({part.numpy().tobytes() for part in parts.values()}) > 1
    middle = image[:, (height - 8) // 2 :, (width - 12) // 2 :][:, :8, :12]
    assert all(torch.equal(centred[epoch, 1]["image"], middle) for epoch in range(2))


def test_test_set_reads_masks(tiny_data):
    samples = read_list(tiny_data / "samples" / "test_dots.json", tiny_data / "images")
    dataset = RealNetTestSet(ImageList(samples, tiny_data / "images"), Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3))
    areas = [int(dataset[i]["mask"].sum()) for i in range(len(dataset))]
    assert areas == [0] * 4 + [64] * 4
    assert dataset[5]["index"] == 5


def test_a_mask_may_differ_in_size_but_not_in_aspect_ratio(tiny_data):
    samples = read_list(tiny_data / "samples" / "test_dots.json", tiny_data / "images")
    dataset = RealNetTestSet(ImageList(samples, tiny_data / "images"), Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3))
    path = tiny_data / "images" / samples[-1].maskname
    expected = dataset[len(samples) - 1]["mask"]
    Image.open(path).resize((128, 128), Image.Resampling.NEAREST).save(path)
    assert torch.equal(dataset[len(samples) - 1]["mask"], expected)
    Image.open(path).resize((128, 64), Image.Resampling.NEAREST).save(path)
    with pytest.raises(UsageError, match=f"{path.name}: mask is 128x64 pixels, but .*{samples[-1].filename}"):
        dataset[len(samples) - 1]


def test_an_empty_cache_keeps_nothing():
    cache = SharedCache(3, (2, 2), 0)
    assert cache.get(0) is None


LEAVES_A_WORKER = """
import torch
from datasets.loaders import SharedBatches, make_loader
from utils.distributed import Run

run = Run(0, 1, torch.device("cpu"))
batches = iter(make_loader(list(range(8)), SharedBatches(8, 2, run), 1, run))
print(next(batches).tolist())
batches.itself = batches  # a cycle, so that nothing ends the worker before the interpreter ends
raise SystemExit(3)
"""


def test_a_rank_that_leaves_a_worker_behind_still_ends():
    """Even though the worker ignores the SIGTERM that multiprocessing sends it."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_A_WORKER],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "[0, 1]\n", "")


@pytest.mark.parametrize(
    ("filename", "defect_type"),
    [
        ("bottle/test/crack/003.png", "crack"),
        ("bottle/test/crack/night/003.png", "crack"),
        ("bottle/test/good/003.png", "good"),
        ("candle/Data/Images/Anomaly/003.JPG", "Anomaly"),
        ("Bad - crack/0.png", "Bad - crack"),
        ("line 2/bottle/bad/dents/0.png", "dents"),
        ("test/hole/0.png", "hole"),
        ("0.png", "defective"),
    ],
)
def test_the_defect_type_is_the_first_folder_below_the_split(filename, defect_type):
    assert Sample(filename, 1, "candle" if "candle" in filename else "bottle").defect_type == defect_type


def test_fewer_samples_than_ranks_do_not_hang():
    for length, world in ((1, 3), (2, 5), (1, 2)):
        batches = [list(EpochBatches(length, 2, Run(rank, world, torch.device("cpu")), 1)) for rank in range(world)]
        assert {len(rank) for rank in batches} == {1}


def test_skip_leaves_out_the_first_batches():
    batches = EpochBatches(10, 3, Run(0, 1, torch.device("cpu")), 1)
    batches.set_epoch(2)
    whole = list(batches)
    batches.set_epoch(2, skip=2)
    assert list(batches) == whole[2:]
    assert len(batches) == 2
    assert np.all([epoch == 2 for batch in batches for epoch, _ in batch])


def test_links_that_lead_out_of_the_image_folder_need_a_setting(tiny_data, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(tiny_data / "images/dots/train/good/000.png", outside / "000.png")
    (tiny_data / "images/dots/train/good/000.png").symlink_to(outside / "000.png")
    path = tiny_data / "samples/train_dots.json"
    with pytest.raises(UsageError, match=r"000\.png is reached by a link that leads out of .*follow_links: True"):
        read_list(path, tiny_data / "images")
    assert len(read_list(path, tiny_data / "images", follow_links=True)) == 8
    # A folder behind a link, too; but the image folder itself may be one.
    shutil.move(tiny_data / "images/lines", outside / "lines")
    (tiny_data / "images/lines").symlink_to(outside / "lines")
    with pytest.raises(UsageError, match="leads out of"):
        read_list(tiny_data / "samples/test_lines.json", tiny_data / "images")
    (tmp_path / "linked").symlink_to(outside)
    lines = tmp_path / "lines.json"
    write_list(lines, [Sample("lines/test/good/000.png", 0, "lines")])
    assert len(read_list(lines, tmp_path / "linked")) == 1


def test_images_for_a_diffusion_model_are_read_as_its_settings_say(tmp_path):
    Image.fromarray(np.full((16, 16), 2048, np.uint16)).save(tmp_path / "camera.png")
    Image.new("RGB", (16, 16), (200, 0, 100)).save(tmp_path / "colour.png")

    def mean(name: str, color_mode: str = "RGB") -> list[int]:
        return sdas_reading(tmp_path, (8, 8), color_mode).read(tmp_path / name).mean(axis=(0, 1)).round().tolist()

    assert mean("camera.png") == [8, 8, 8]
    assert mean("colour.png") == [200, 0, 100]
    assert mean("colour.png", "GRAY") == [71, 71, 71]
    config = settings("data/tiny", "experiments/tiny")["diffusion"]
    config["dataset"]["image_reader"]["kwargs"] |= {"bits": 12, "color_mode": "GRAY"}
    (tmp_path / "diffusion.yaml").write_text(yaml.safe_dump(config))
    assert mean("camera.png") == [128, 128, 128]
    assert mean("colour.png") == [71, 71, 71]
