"""Export a trained detector to ONNX and to torch.export, and check both against PyTorch on real images.

    python export.py --checkpoint experiments/MyParts/realnet_checkpoints/bolts --output exported
    python export.py --checkpoint FILE --output exported --format onnx --input IMAGES

Writes <output>/model.onnx and <output>/model.pt2. Both take images (N,3,H,W) float32, any N, prepared as the metadata
says, which both files hold (in model.pt2: extra_files of torch.export.load), and return anomaly_map (N,H,W) and score
(N,). `predict.py --checkpoint model.onnx` or model.pt2 scores images with them, in float32 only.
ONNX needs `pip install -r requirements-export.txt`.
"""

import argparse
from pathlib import Path

from utils import arguments


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, or class folder with a checkpoint")
    parser.add_argument("--config", help="realnet.yaml, for checkpoints that hold no settings")
    parser.add_argument("--output", required=True, type=Path, help="folder for the models")
    parser.add_argument("--format", choices=["onnx", "torch", "both"], default="both")
    parser.add_argument("--overwrite", action="store_true", help="replace models in the folder")
    parser.add_argument("--input", help="images for the check (default: from the test list)")
    return parser.parse_args()


arguments.parse_early(__name__, parse_args)

import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable

import numpy as np
import torch
from easydict import EasyDict
from torch import nn

from datasets.build import build_realnet_test_set, preprocessing_of
from datasets.lists import listed_classes
from evaluation.detector import checkpoint_path
from evaluation.inputs import find_inputs
from evaluation.score import pooling_window
from evaluation.thresholds import as_content
from evaluation.trained_model import TrainedModel, load_trained
from models.realnet import ExportedRealNet
from utils import cli
from utils.checkpoint import has_finite_weights
from utils.config import load_config, plain
from utils.counts import counted
from utils.errors import RunError, UsageError
from utils.files import PART, remove_parts, write_atomic, write_checksums
from utils.launcher import as_one_process
from utils.lock import folder_lock
from utils.log import log, log_to_terminal
from utils.precision import FP32

IMAGES = 8
TOLERANCE = 1e-3
ONNX_OPSET = 20
MOST_BYTES = 1_900_000_000  # of weights in one ONNX file, whose limit is 2 GiB


def main() -> None:
    as_one_process()
    args = parse_args()
    log_to_terminal()
    if args.format != "torch":
        require_onnx(args.format)
    path = checkpoint_path(args.checkpoint)
    endings = {"onnx": ["onnx"], "torch": ["pt2"]}.get(args.format, ["onnx", "pt2"])
    existing = [file for file in (args.output / f"model.{ending}" for ending in endings) if file.exists()]
    if existing and not args.overwrite:
        raise UsageError(f"{existing[0]} already exists; choose another --output, or pass --overwrite")
    with folder_lock(args.output):
        remove_parts(args.output)
        export(args, path)


def export(args: argparse.Namespace, path: Path) -> None:
    """Write the models, and compare each with the network."""
    trained = load_trained(path, load_config(args.config, script="realnet") if args.config else None, args.config)
    config = trained.config
    model = ExportedRealNet(trained.network, pooling_window(config.evaluator)).eval()
    images = check_images(args, path, config)
    with torch.inference_mode():
        expected = [output.numpy() for output in model(images)]
    if not has_finite_weights(model) or not all(np.isfinite(output).all() for output in expected):
        raise RunError(f"{path}: its weights or anomaly maps are not finite; train it again with a lower lr")
    metadata = describe(trained, path)
    log.info("exporting, and checking on %s; this can take some minutes", counted(len(images), "image"))
    if args.format != "torch":
        file = args.output / "model.onnx"
        parts = export_onnx(model, images, file, metadata)
        compare(file, expected, run_onnx(file, images))
        write_checksums(file, *parts)
    if args.format != "onnx":
        file = args.output / "model.pt2"
        program = export_torch(model, images, metadata)
        write_atomic(file, lambda part: part.write_bytes(program))
        compare(file, expected, run_torch(file, images))
        write_checksums(file)
    log.info("Next: python %s", cli.predict_command(file))


def require_onnx(wanted: str) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        rest = "" if wanted == "onnx" else ", or --format torch"
        raise RunError(f"{error.name} is not installed; pip install -r requirements-export.txt{rest}") from None


def check_images(args: argparse.Namespace, path: Path, config: EasyDict) -> torch.Tensor:
    """A few prepared images (N,3,H,W), spread evenly over --input or, without it, over the class's test list."""
    preprocessing = preprocessing_of(config.dataset)
    root = Path(config.dataset.image_reader.kwargs.image_dir)
    if args.input:
        files = [source.path for source in find_inputs(args.input, str(root), []).images]
    else:
        meta_file, name = config.dataset.test.meta_file, path.parent.name
        if "{}" in meta_file and name not in listed_classes(meta_file):
            raise UsageError(f"{meta_file}: has no list for {name}; pass images for the check as --input")
        files = [root / sample.filename for sample in build_realnet_test_set(config.dataset, name).samples]
    if len(files) < 2:
        raise UsageError("the check needs at least two images; pass them as --input")
    chosen = [files[int(k)] for k in np.linspace(0, len(files) - 1, min(IMAGES, len(files)))]
    return torch.stack([preprocessing.tensor(preprocessing.read(file)) for file in chosen])


def describe(trained: TrainedModel, path: Path) -> dict[str, str]:
    """The metadata for deployment: preprocessing, settings and thresholds.

    Raises:
        UsageError: the thresholds are not for fp32, in which exported models run.
    """
    config, thresholds = trained.config, trained.thresholds(path)
    if thresholds is not None:
        thresholds.check_precision(FP32, f"{path} (exports run in {FP32} only)")
    dataset = config.dataset
    preprocessing = {
        "input": "image: float32 (N,3,height,width), channels in the order given",
        "order": "BGR" if dataset.image_reader.kwargs.color_mode == "BGR" else "RGB",
        "bits": dataset.image_reader.kwargs.bits or 16,
        "grey": dataset.image_reader.kwargs.color_mode == "GRAY",
        "size": {"height": dataset.input_size[0], "width": dataset.input_size[1]},
        "resize": "Pillow's BILINEAR (antialiased), of the image turned upright by its EXIF orientation",
        "scale": "(value / 255 - mean) / std",
        "mean": list(dataset.pixel_mean),
        "std": list(dataset.pixel_std),
        "outputs": "anomaly_map: float32 (N,height,width) in [0,1]; score: float32 (N,), its highest "
        f"{'x'.join(map(str, pooling_window(config.evaluator)))} mean",
    }
    return {
        "preprocessing": json.dumps(preprocessing),
        "config": json.dumps(plain(config)),
        "thresholds": json.dumps(as_content(thresholds) if thresholds else None),
        "fingerprint": trained.fingerprint,
    }


# ---- formats ---------------------------------------------------------------------------------------------------------


def export_onnx(model: nn.Module, images: torch.Tensor, file: Path, metadata: dict[str, str]) -> list[Path]:
    """Write an ONNX file; weights that are too large for it go to <file>.data beside it, whose path is returned."""
    import onnx

    # Silence the exporter, which warns about every operator; compare() checks the result.
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=["image"],
            output_names=["anomaly_map", "score"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    program.model.metadata_props.update(metadata)
    external = sum(p.numel() * p.element_size() for p in model.state_dict().values()) > MOST_BYTES
    with cli.writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PART, dir=file.parent) as folder:
            written = Path(folder) / file.name
            program.save(str(written), external_data=external)
            onnx.checker.check_model(str(written))
            # Move the data first, because the model file refers to it.
            parts = sorted(Path(folder).iterdir(), key=lambda part: part.name == file.name)
            for part in parts:
                part.replace(file.parent / part.name)
    return [file.parent / part.name for part in parts if part.name != file.name]


def run_onnx(file: Path, images: torch.Tensor) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return _with_batch_of_one(lambda x: session.run(None, {"image": x.numpy()}), images)


def export_torch(model: nn.Module, images: torch.Tensor, metadata: dict[str, str]) -> bytes:
    """The content of model.pt2. In memory, because torch's writer ends the process when a disk is full."""
    # Under no_grad, or the exported program would switch gradients off itself and could not be loaded again.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=metadata)
    return buffer.getvalue()


def run_torch(file: Path, images: torch.Tensor) -> list[np.ndarray]:
    module = torch.export.load(file).module()
    with torch.inference_mode():
        return _with_batch_of_one(lambda x: [output.numpy() for output in module(x)], images)


def _with_batch_of_one(call: Callable[[torch.Tensor], list[np.ndarray]], images: torch.Tensor) -> list[np.ndarray]:
    """The outputs for a batch, with the first image run as a batch of one, to check that the batch size is dynamic."""
    batch_outputs, single_outputs = call(images), call(images[:1])
    return [np.concatenate([single, batch[1:]]) for single, batch in zip(single_outputs, batch_outputs, strict=True)]


def compare(file: Path, expected: list[np.ndarray], got: list[np.ndarray]) -> None:
    """Print the largest difference from PyTorch.

    Raises:
        RunError: the difference is too large to be rounding.
    """
    names = ("anomaly map", "score")
    largest = [float(np.abs(a - b).max()) for a, b in zip(expected, got, strict=True)]
    text = ", ".join(f"{name} {value:.2g}" for name, value in zip(names, largest, strict=True))
    log.info(
        "%s: %.1f MiB; largest difference from PyTorch on %s: %s",
        file,
        file.stat().st_size / 2**20,
        counted(len(got[0]), "image"),
        text,
    )
    # nan is above nothing, so the question is whether all differences are small.
    if not all(value <= TOLERANCE for value in largest):
        raise RunError(f"{file}: differs from PyTorch by {np.max(largest):.2g}, more than {TOLERANCE:g}; do not use it")


if __name__ == "__main__":
    cli.run(main)
