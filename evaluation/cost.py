"""What a detector costs: parameters, time per image, and the weights that it began with.

python -m evaluation.cost --checkpoint FILE --output cost.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from evaluation.trained_model import load_trained
from models.backbones import find_weights
from models.realnet import RealNet
from utils import cli
from utils.distributed import pick_device
from utils.files import sha256, write_text

BATCHES = (1, 16)  # images at once
WARM_UP, MOST, SECONDS = 2, 50, 3.0  # passes before the timed ones; timed passes, or for how long, but at least WARM_UP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint of train_realnet.py")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: a GPU if there is one")
    args = parser.parse_args()
    trained = load_trained(args.checkpoint)
    device = pick_device(args.device)
    size = tuple(trained.config.dataset.input_size)
    network = trained.network.to(device)
    content = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **{f"ms_per_image_{n}": 1000 * seconds_per_image(network, n, size, device) for n in BATCHES},
        "input_size": list(size),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        **backbone_weights(trained.config.net),
    }
    write_text(args.output, json.dumps(content, indent=2) + "\n")


@torch.inference_mode()
def seconds_per_image(network: RealNet, batch: int, size: tuple[int, int], device: torch.device) -> float:
    """The median time of a warm forward pass over images on the device, divided by their number."""
    images, passes = torch.rand(batch, 3, *size, device=device), []
    end = float("inf")
    while len(passes) < WARM_UP * 2 or (len(passes) < MOST and time.perf_counter() < end):
        begin = time.perf_counter()
        # Reading a value waits for the device.
        network({"image": images})["anomaly_score"].max().item()
        passes.append(time.perf_counter() - begin)
        if len(passes) == WARM_UP:
            end = time.perf_counter() + SECONDS
    return statistics.median(passes[WARM_UP:]) / batch


def backbone_weights(net: list[dict[str, Any]]) -> dict[str, str | None]:
    """The backbone's name, the file that its weights came from, and the file's SHA-256; None for random weights."""
    kwargs = next(part["kwargs"] for part in net if part["name"] == "backbone")
    weights = kwargs.get("weights", "auto")
    found = {"backbone": kwargs["backbone"], "weights": weights, "weights_sha256": None}
    if weights != "random":
        path = find_weights(kwargs["backbone"]) if weights == "auto" else Path(weights)
        found |= {"weights": str(path), "weights_sha256": sha256(path)}
    return found


if __name__ == "__main__":
    cli.run(main)
