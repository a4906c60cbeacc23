"""Places good images in a folder of pairs, so that it is a data set of its own."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from datasets.images import Preprocessing
from datasets.lists import ImageList
from utils.files import link_file
from utils.pictures import write_image


def good_names(images: ImageList, indices: Sequence[int]) -> list[str]:
    """A file name without ending for each image: its own, with its number before it where names repeat.

    Example:
        >>> from datasets.lists import Sample
        >>> good_names(ImageList([Sample("a/1.png", 0, "x"), Sample("b/1.png", 0, "x")], Path()), [0, 1])
        ['000000_1', '000001_1']
    """
    stems = [PurePosixPath(images.samples[index].filename).stem for index in indices]
    if len({stem.lower() for stem in stems}) == len(stems):
        return stems
    return [f"{number:06d}_{stem}" for number, stem in enumerate(stems)]


def place_good(path: Path, target: Path, preprocessing: Preprocessing, full_size: bool) -> None:
    """Put a good image at `target` with an ending, unless it is there.

    At the input size it is resized. At its full size it is another name of the same file (a copy where the file system
    has no hard links), or decoded if the settings say how: grey, or of cameras with 12 bits, say.

    Args:
        target: path without its ending.
    """
    as_it_is = full_size and preprocessing.color_mode != "GRAY" and preprocessing.bits is None
    target = target.with_name(target.name + (path.suffix.lower() if as_it_is else ".png"))
    if target.is_file():
        return
    if as_it_is:
        link_file(path.resolve(), target)
    else:
        write_image(target, preprocessing.read_full(path) if full_size else preprocessing.read(path))
