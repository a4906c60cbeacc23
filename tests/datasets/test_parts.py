"""Which images show the same part, and that splits keep them together."""

import numpy as np
import pytest

from datasets.lists import Sample
from datasets.parts import parts_of
from datasets.splits import Fingerprint, split_good
from preparation.duplicates import report_leaks
from utils.errors import UsageError

NAMES = ["train/good/kos01_Part0.jpg", "train/good/kos01_Part1.jpg", "train/good/kos02_Part0.jpg", "train/good/x.jpg"]


def unrelated(count):
    """Fingerprints of images that have nothing in common."""
    rng = np.random.default_rng(0)
    layouts = rng.normal(size=(count, 256)).astype(np.float32)
    layouts /= np.linalg.norm(layouts, axis=1, keepdims=True)
    return [Fingerprint(layout, rng.integers(0, 256, (96, 96), np.uint8)) for layout in layouts]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"kos\d+", ["kos01", "kos01", "kos02"]),
        (r"kos(\d+)", ["01", "01", "02"]),
        (r"(kos)(\d+)_P", ["kos 01", "kos 01", "kos 02"]),
    ],
)
def test_a_pattern_names_the_part(pattern, expected):
    assert parts_of(pattern, NAMES) == dict(zip(NAMES[:3], expected, strict=True))
    assert parts_of(None, NAMES) == {}


def test_a_table_names_files_with_or_without_their_folders(tmp_path):
    table = tmp_path / "split.csv"
    table.write_text("\ufefffile,part,exposure\ntrain/good/kos01_Part0.jpg,a,1\nkos01_Part1.jpg,a,2\n\nx.jpg,b,1\n")
    assert parts_of(str(table), NAMES) == {NAMES[0]: "a", NAMES[1]: "a", NAMES[3]: "b"}
    # A bare name that files of several parts have says nothing.
    table.write_text("file,part\none/x.jpg,a\ntwo/x.jpg,b\nkos02_Part0.jpg,c\n")
    assert parts_of(str(table), NAMES) == {NAMES[2]: "c"}
    # Nor does one of an image that the table names with its folders.
    table.write_text("file,part\ntrain/good/x.jpg,a\n")
    assert parts_of(str(table), [*NAMES, "test/bent/x.jpg"]) == {NAMES[3]: "a"}


@pytest.mark.parametrize("mark", ",;\t")
def test_a_table_needs_no_heading_and_may_come_from_any_spreadsheet(tmp_path, mark):
    table = tmp_path / "split.csv"
    rows = [("kos01_Part0.jpg", "a"), ("kos01_Part1.jpg", "a"), ("x.jpg", "b")]
    table.write_text("".join(mark.join(row) + "\r\n" for row in rows))
    assert parts_of(str(table), NAMES) == {NAMES[0]: "a", NAMES[1]: "a", NAMES[3]: "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing.csv does not exist"),
        ("file,part\nonly.jpg\n", "line 2: has no second column"),
        ("file,part\nother.jpg,a\n", "names the part of none of the images, e.g. train/good/kos01_Part0.jpg"),
        ("", "names the part of none of the images"),
    ],
)
def test_tables_of_no_use_are_refused(tmp_path, content, message):
    path = tmp_path / ("missing.csv" if content is None else "parts.csv")
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"dataset\.train\.parts: ") as error:
        parts_of(str(path), NAMES)
    assert message in str(error.value)


def test_patterns_of_no_use_are_refused():
    with pytest.raises(UsageError, match=r"--parts: kos\( is neither a .csv file nor a regular expression"):
        parts_of("kos(", NAMES, "--parts")
    with pytest.raises(UsageError, match="--parts: tile names the part of none"):
        parts_of("tile", NAMES, "--parts")


def test_the_images_of_a_part_stay_on_one_side_of_a_split():
    samples = [Sample(f"{part}_{view}.png", 0, "tiles") for part in range(10) for view in range(6)]
    fingerprints = dict(zip((s.filename for s in samples), unrelated(len(samples)), strict=True))
    parts = parts_of(r"^\d+", [sample.filename for sample in samples])
    for seed in range(5):
        train, held_out = split_good(samples, fingerprints, 0.2, seed, 8, parts)
        assert len(held_out) == 12
        assert not {parts[s.filename] for s in train} & {parts[s.filename] for s in held_out}
    # Without knowing the parts, they are torn apart.
    train, held_out = split_good(samples, fingerprints, 0.2, 0, 8)
    assert {parts[s.filename] for s in train} & {parts[s.filename] for s in held_out}


def test_parts_outlive_images_that_all_look_the_same():
    samples = [Sample(f"{part}_{view}.png", 0, "tiles") for part in range(4) for view in range(3)]
    fingerprints = {sample.filename: unrelated(1)[0] for sample in samples}
    parts = parts_of(r"^\d+", [sample.filename for sample in samples])
    _, held_out = split_good(samples, fingerprints, 0.25, 0, parts=parts)
    assert len(held_out) == 3
    assert len({parts[s.filename] for s in held_out}) == 1


def test_a_part_on_both_sides_of_the_users_own_split_is_a_finding():
    train, test = [Sample("a_1.png", 0, "tiles"), Sample("b_1.png", 0, "tiles")], [Sample("b_2.png", 1, "tiles")]
    names = [sample.filename for sample in train + test]
    found = report_leaks(train, test, dict(zip(names, unrelated(3), strict=True)), parts_of("^[ab]", names))
    assert [(f.where, f.text) for f in found] == [("b_2.png", "shows the same part (b) as the training image b_1.png")]
