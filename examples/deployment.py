# %% [markdown]
# # A detector in use: from Python, exported, and on large images
#
#     python examples/deployment.py
#     python examples/deployment.py --quick    # a few steps, to see that everything runs
#
# Everything is written to `examples_output/deployment/`, below the folder where this is started.

# %%
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

QUICK = "--quick" in sys.argv  # in a notebook: True or False
# A notebook has no __file__; it runs in the folder that it lies in.
REPOSITORY = Path(globals().get("__file__", "notebook.ipynb")).resolve().parent.parent
WORK = Path("examples_output", "deployment_quick" if QUICK else "deployment").resolve()
WORK.mkdir(parents=True, exist_ok=True)
sys.path.insert(0, str(REPOSITORY))


def run(command: str) -> None:
    """Run a script of the repository in the folder WORK, as one would in a terminal there."""
    print(f"\n$ python {command}", flush=True)
    script, *arguments = shlex.split(command)
    if subprocess.run([sys.executable, str(REPOSITORY / script), *arguments], cwd=WORK).returncode:
        sys.exit(f"this command has failed: {command}")


# %% [markdown]
# ## A detector
#
# It is trained on close-ups of scikit-image's photograph of gravel, from the left third, and tested on others beside
# them, some with a hole. The right half is the large image of later, once as it is and once with a hole.

# %%
import cv2
import numpy as np
from skimage import data as photographs

from preparation.demo import SIZE, crop, draw_hole
from utils.pictures import write_image

HEIGHT = 512 if QUICK else 1536
rng = np.random.default_rng(0)
photograph = cv2.resize(photographs.gravel(), (HEIGHT, HEIGHT), interpolation=cv2.INTER_CUBIC)
third, half = HEIGHT // 3, HEIGHT // 2
for i in range(15 if QUICK else 60):
    write_image(WORK / "shots/gravel/train/good" / f"{i:02d}.png", crop(photograph, rng, 0, third))
for i in range(8):
    close_up = crop(photograph, rng, half - SIZE, half)
    write_image(WORK / "shots/gravel/test/good" / f"{i}.png", close_up)
    holed, mask = draw_hole(close_up, close_up, rng)
    write_image(WORK / "shots/gravel/test/hole" / f"{i}.png", np.clip(holed, 0, 255).astype(np.uint8))
    write_image(WORK / "shots/gravel/ground_truth/hole" / f"{i}_mask.png", mask * np.uint8(255))

large = photograph[:, half:].copy()
write_image(WORK / "large" / "good.png", large)
part = large[third : third + SIZE, :SIZE]
part[:] = np.clip(draw_hole(part, part, rng)[0], 0, 255)
write_image(WORK / "large" / "hole.png", large)

# %%
INPUT = 32 if QUICK else SIZE
run(f"prepare_data.py --dataset gravel --root shots --preset quick --backbone resnet18 --input-size {INPUT} {INPUT}")

# %%
STEPS = 2 if QUICK else 50
TRAINED = "experiments/gravel/realnet_checkpoints/gravel"
run(
    "train_realnet.py --dataset gravel --class_name gravel --overwrite --set net.backbone.kwargs.weights=random "
    f"--set net.afs.kwargs.init_bsn=8 --set trainer.max_step={STEPS} --set dataset.workers=0"
)

# %% [markdown]
# ## In Python
#
# A checkpoint is all that is needed: it holds the settings, and the scores of the good images that were held out. An
# image is a path, a Pillow image or an array; the result has a score, an anomaly map and a mask of the image's size,
# and a verdict.

# %%
from evaluation.detector import Detector

detector = Detector.load(WORK / TRAINED, device="cpu")
paths = sorted((WORK / "shots/gravel/test").rglob("*.png"))
result = detector(paths[0])
print(f"{paths[0].name}: score {result.score:.4f}, anomalous: {result.is_anomalous}, map {result.map.shape}")

# %% [markdown]
# The threshold follows from the false alarm rate that one can live with: `at(rate)`. Rates below one in the number of
# held-out images are estimated from the distribution of their scores. `predict_many` takes any number of images, here
# all of the test.

# %%
results = list(detector.predict_many(paths))
for rate in (0.2, 0.05, 0.01, 0.001):
    thresholds = detector.thresholds.at(rate)
    flagged = [
        path.parent.name for path, result in zip(paths, results, strict=True) if result.score >= thresholds.image
    ]
    counts = f"{flagged.count('good')} of 8 good ones, {flagged.count('hole')} of 8 with a hole"
    print(f"at most {rate:.1%} false alarms: threshold {thresholds.image:.4f}, flags {counts}")

# %% [markdown]
# `detector.with_thresholds(detector.thresholds.at(0.05))` is the same detector with another threshold, whose verdicts
# and masks follow it.

# %%
cautious = detector.with_thresholds(detector.thresholds.at(0.001))
print([cautious(path).is_anomalous for path in paths[:2]], [cautious(path).is_anomalous for path in paths[-2:]])

# %% [markdown]
# ## Exported and back
#
# `export.py` writes the detector for other runtimes and compares it with PyTorch on real images. ONNX needs `pip
# install -r requirements-export.txt`; without it, this example takes torch.export's format. Both load as checkpoints
# do. It is the slowest step, and left out with `--quick`.

# %%
KIND, FILE = ("onnx", "model.onnx") if importlib.util.find_spec("onnxruntime") else ("torch", "model.pt2")
if not QUICK:
    run(f"export.py --checkpoint {TRAINED} --output exported --format {KIND} --overwrite")
    exported = Detector.load(WORK / "exported" / FILE)
    difference = max(abs(exported(path).score - detector(path).score) for path in paths[:4])
    print(f"{FILE}: the scores differ by {difference:.1e} at most")

# %% [markdown]
# ## Large images in tiles
#
# Scored as a whole, a large image shrinks to the model's input, and a small defect with it.

# %%
for name in ("good.png", "hole.png"):
    result = cautious(WORK / "large" / name)
    print(f"whole  {name:9} score {result.score:.4f}  {'anomalous' if result.is_anomalous else 'normal'}")

# %% [markdown]
# Tiles keep the pixels' size. The evaluation chooses thresholds for tiles of this size. An image of many tiles has as
# many chances of a false alarm, so a rate is asked for that is far below one in the number of tiles.

# %%
run(f"evaluation_realnet.py --dataset gravel --class_name gravel --tile {SIZE} --overlap 32")
run(
    f"predict.py --checkpoint {TRAINED} --input large --output results --target-fpr 0.0005 --tile {SIZE} --overlap 32 "
    "--overwrite"
)

# %% [markdown]
# `results/heatmaps/hole.png` shows where the hole is. `scores.jsonl` is for programs.

# %%
for line in (WORK / "results" / "scores.jsonl").read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    print(f"tiles  {row['file']:9} score {row['score']:.4f}  {row['verdict']}")
