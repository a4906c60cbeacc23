"""Places good images in a folder of pairs, so that it is a data set of its own."""

from collections.abc import Sequence
from pathlib import Path

from datasets.images import Preprocessing
from datasets.lists import ImageList
from utils.files import link_file
from utils.pictures import write_image


def good_places(images: ImageList, indices: Sequence[int], folder: Path) -> list[tuple[Path, Path]]:
    """The path of each image, and its place in a folder, without ending: by its name, numbered where names repeat.

    Example:
        >>> from datasets.lists import Sample
        >>> images = ImageList([Sample("a/1.png", 0, "x"), Sample("b/1.png", 0, "x")], Path())
        >>> [place.as_posix() for _, place in good_places(images, [0, 1], Path("good"))]
        ['good/000000_1', 'good/000001_1']
    """
    paths = [images.path(index) for index in indices]
    names = [path.stem for path in paths]
    if len({name.lower() for name in names}) < len(names):
        names = [f"{number:06d}_{name}" for number, name in enumerate(names)]
    return [(path, folder / name) for path, name in zip(paths, names, strict=True)]


def place_good(preprocessing: Preprocessing, full_size: bool, place: tuple[Path, Path]) -> None:
    """Put a good image at its place (see good_places), with an ending, unless it is there.

    At the input size it is resized. At its full size it is another name of the same file (a copy where the file system
    has no hard links), or decoded if the settings say how: grey, or of cameras with 12 bits, say.
    """
    path, target = place
    as_it_is = full_size and preprocessing.color_mode != "GRAY" and preprocessing.bits is None
    target = target.with_name(target.name + (path.suffix.lower() if as_it_is else ".png"))
    if target.is_file():
        return
    if as_it_is:
        link_file(path.resolve(), target)
    else:
        write_image(target, preprocessing.read_full(path) if full_size else preprocessing.read(path))
