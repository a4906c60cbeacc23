"""The images that sample.py has drawn, and their strengths."""

import numpy as np

from datasets.pairs import TrainingPairs
from datasets.sdas_folders import SDASFolder
from tests.datasets.test_synthesis import train_set

GREY = np.full((8, 8, 3), 90, np.uint8)


def test_strengths_are_known_for_images_that_are_there(tmp_path):
    folder = SDASFolder(tmp_path / "dots")
    folder.path.mkdir()
    for index, strength, rank in ((3, 0.1, 0), (1, 0.25, 1), (10, 0.2, 0)):
        folder.write(index, GREY, strength, seed=7, rank=rank)
    assert folder.indices() == {1, 3, 10}
    assert folder.strengths() == {"rank0_3.jpg": 0.1, "rank1_1.jpg": 0.25, "rank0_10.jpg": 0.2}  # before it is finished
    (folder.path / "rank0_10.jpg").unlink()
    folder.finish()
    text = (folder.path / "strengths.csv").read_text()
    assert text == "image,strength,seed\nrank1_1.jpg,0.2500,7\nrank0_3.jpg,0.1000,7\n"
    # Drawn again by another run, with another strength; the others stay as they are.
    folder.begin(overwrite=False)
    folder.write(10, GREY, 0.4, seed=8, rank=0)
    folder.finish()
    assert folder.strengths() == {"rank1_1.jpg": 0.25, "rank0_3.jpg": 0.1, "rank0_10.jpg": 0.4}
    folder.begin(overwrite=True)
    assert list(folder.path.iterdir()) == []


def test_pairs_have_the_strength_of_their_source_if_it_is_known(tiny_data):
    dataset = train_set(tiny_data, {"sdas": 0.5, "noise": 0.5})
    folder = dataset.synthesis.sources["sdas/dots"][0].parent
    SDASFolder(folder).write(0, GREY, 0.125, seed=1, rank=0)
    dataset = train_set(tiny_data, {"sdas": 0.5, "noise": 0.5})
    make = TrainingPairs(dataset, range(len(dataset)), full_size=False)
    found = {(pair.source and pair.source.name, pair.strength) for pair in map(make, range(48))}
    assert ("rank0_0.jpg", 0.125) in found
    assert (None, None) in found
    assert len(found) > 3
    assert all(strength is None for name, strength in found if name != "rank0_0.jpg")
