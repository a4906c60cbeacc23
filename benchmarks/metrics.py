"""Time and memory of all metrics, as a multiple of scikit-learn's roc_auc_score on the same pixels in the same run.

    python benchmarks/metrics.py                 four sizes up to MVTec-AD's 1725 maps of 256x256, 1258 with a defect
    python benchmarks/metrics.py --maps 100 200

Each measurement runs in a separate process, so that its peak memory is not that of another. All metrics together may
take three times as long as roc_auc_score, and at the largest size 60 s and 3 GiB.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIDE, DEFECTIVE = 256, 1258 / 1725
LIMIT = 3.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, nargs="+", default=[216, 431, 862, 1725], help="numbers of maps")
    parser.add_argument("--measure", choices=["all metrics", "scikit-learn"], help=argparse.SUPPRESS)
    return parser.parse_args()


def make_maps(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random anomaly maps with higher scores in elliptic defects, like a network's."""
    rng = np.random.default_rng(0)
    scores, masks = np.empty((count, SIDE, SIDE), np.float32), np.zeros((count, SIDE, SIDE), bool)
    for k in range(count):
        noise = cv2.resize(rng.random((32, 32), np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        if k < round(DEFECTIVE * count):
            defects = np.zeros((SIDE, SIDE), np.uint8)
            for _ in range(int(rng.integers(1, 4))):
                centre, axes = rng.integers(20, SIDE - 20, 2).tolist(), rng.integers(3, 24, 2).tolist()
                cv2.ellipse(defects, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
            masks[k] = defects > 0
            noise = noise + 0.5 * defects
        scores[k] = 1 / (1 + np.exp(-8 * (noise - 1)))
    return scores, masks


def measure(what: str, count: int) -> None:
    """Print seconds, the process's peak memory in GiB, and pixel AUROC as JSON."""
    from sklearn.metrics import roc_auc_score

    from evaluation.metrics import anomaly_metrics

    scores, masks = make_maps(count)
    start = time.perf_counter()
    if what == "all metrics":
        auroc = anomaly_metrics(scores, masks, pixel_threshold=0.6)["pixel_auroc"]
    else:
        auroc = roc_auc_score(masks.ravel(), scores.ravel())
    elapsed = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": elapsed, "peak": peak, "auroc": float(auroc)}))


def run(what: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, "--maps", str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    args = parse_args()
    if args.measure:
        measure(args.measure, args.maps[0])
        return
    print(
        f"{'maps':>5} {'pixels':>8}  {'all metrics':>18} {'peak':>8}  {'roc_auc_score':>13} {'peak':>8}  ratio  s/Mpx"
    )
    for count in args.maps:
        # Run scikit-learn before and after, because the machine's speed may change in between.
        first, project, second = run("scikit-learn", count), run("all metrics", count), run("scikit-learn", count)
        reference = (first["seconds"] + second["seconds"]) / 2
        assert abs(project["auroc"] - first["auroc"]) < 1e-6
        millions, ratio = count * SIDE**2 / 1e6, project["seconds"] / reference
        print(
            f"{count:5} {millions:7.1f}M  {project['seconds']:16.1f} s {project['peak']:4.1f} GiB  {reference:11.1f} s "
            f"{first['peak']:4.1f} GiB  {ratio:5.2f}  {project['seconds'] / millions:.3f}"
        )
        if ratio > LIMIT:
            print(f"      MISSED: more than {LIMIT:g} times as long")
    print("Peak memory includes the process with its libraries and the maps themselves.")


if __name__ == "__main__":
    main()
