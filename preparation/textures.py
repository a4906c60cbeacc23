"""Recognises a collection of textures on disk, for the anomaly type dtd."""

from pathlib import Path, PurePosixPath

from datasets.catalog import TEXTURES
from preparation.findings import MISSING, SURPLUS, Finding
from preparation.folders import Reader, has_images
from preparation.official import DEPTH
from utils.errors import UsageError


def recognize_textures(folder: Path, dataset: str) -> tuple[Path, list[str], list[Finding]]:
    """Recognise a collection of textures: its root folder, its images, and differences from the published counts.

    Raises:
        UsageError: no textures are found.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    info = TEXTURES[dataset]
    level = [folder]
    for _ in range(DEPTH):
        for path in level:
            if any(has_images(sub) for sub in Reader(folder).subfolders(path)):
                reader = Reader(path)
                images = [reader.name(image) for image in reader.images(path)]
                folders = len({PurePosixPath(name).parts[0] for name in images})
                for have, want, what in (
                    (folders, info.folders, "folders"),
                    (len(images), info.images, "images"),
                ):
                    if have != want:
                        reader.report(
                            MISSING if have < want else SURPLUS,
                            what,
                            f"{have} here, {want} published; any number will do for training",
                        )
                return path, images, reader.findings
        level = [sub for path in level for sub in Reader(folder).subfolders(path)]
    raise UsageError(f"{folder}: no textures found; expected {info.type}/<texture>/*.jpg")
