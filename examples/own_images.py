# %% [markdown]
# # From a folder of pictures to verdicts
#
# A factory has a folder of photographs, sorted into OK and not OK. This example makes such a folder, lets
# `prepare_data.py` write lists and settings, trains a detector, says how good it is, and scores new pictures.
#
#     python examples/own_images.py            # a minute or two of one CPU core
#     python examples/own_images.py --quick    # a few steps: it shows the way, but no detector comes out of it
#
# Everything is written to `examples_output/own_images/`, below the folder where this is started.

# %%
import csv
import shlex
import subprocess
import sys
from pathlib import Path

QUICK = "--quick" in sys.argv  # in a notebook: True or False
# A notebook has no __file__; it runs in the folder that it lies in.
REPOSITORY = Path(globals().get("__file__", "notebook.ipynb")).resolve().parent.parent
WORK = Path("examples_output", "own_images_quick" if QUICK else "own_images").resolve()
WORK.mkdir(parents=True, exist_ok=True)
sys.path.insert(0, str(REPOSITORY))


def run(command: str) -> None:
    """Run a script of the repository in the folder WORK, as one would in a terminal there."""
    print(f"\n$ python {command}", flush=True)
    script, *arguments = shlex.split(command)
    if subprocess.run([sys.executable, str(REPOSITORY / script), *arguments], cwd=WORK).returncode:
        sys.exit(f"this command has failed: {command}")


# %% [markdown]
# ## The pictures
#
# In place of the factory's, a photograph of a brick wall that comes with scikit-image is enlarged and cut into tiles
# that do not overlap. A third of them get a scratch or a stain, drawn as in the demo, with a mask. With pictures of
# your own, skip this cell and give `--root` their folder below. Masks are optional.

# %%
import cv2
import numpy as np
from skimage import data as photographs

from preparation.demo import DEFECTS, SIZE
from utils.pictures import write_image

ACROSS = 5 if QUICK else 10  # tiles in each direction
rng = np.random.default_rng(0)
wall = cv2.resize(photographs.brick(), (ACROSS * SIZE, ACROSS * SIZE), interpolation=cv2.INTER_CUBIC)
corners = [(top, left) for top in range(0, wall.shape[0], SIZE) for left in range(0, wall.shape[1], SIZE)]
for i, (top, left) in enumerate(rng.permutation(corners)):
    tile = wall[top : top + SIZE, left : left + SIZE]
    kind = ("OK", "OK", "scratch", "OK", "OK", "stain")[i % 6]
    folder = "new" if i < 6 else f"shots/{kind}" if kind == "OK" else f"shots/NG_{kind}"
    if kind != "OK":
        changed, mask = DEFECTS[kind](tile, tile, rng)
        tile = np.clip(changed, 0, 255).astype(np.uint8)
        if folder != "new":
            write_image(WORK / folder / f"{i:02d}_mask.png", mask * np.uint8(255))
    write_image(WORK / folder / (f"{i:02d}_{kind}.png" if folder == "new" else f"{i:02d}.png"), tile)

# %% [markdown]
# ## Lists and settings
#
# The folders' names say which pictures are good. The table shows what became of each folder; nothing has to be
# edited. The options after `--root` make a small detector; your own pictures need none of them but `--preview`.

# %%
INPUT = 32 if QUICK else SIZE
run(
    "prepare_data.py --dataset bricks --root shots --preset quick --backbone resnet18 "
    f"--input-size {INPUT} {INPUT} --preview"
)

# %% [markdown]
# Look at `data/bricks/preview/bricks.png` in the example's folder before anything is trained: good images, defective
# ones with their masks, and a row of each type of anomaly that training will make of the good ones.
#
# ## Training
#
# Only good pictures are trained on, and a fifth of them is held out, for thresholds. Nothing is downloaded here, so
# the network's weights are random; for your own pictures leave out all `--set`: pretrained weights are fetched then,
# and 300 steps trained. `dataset.workers=0` reads so few images without processes of their own.

# %%
STEPS = 2 if QUICK else 50
run(
    "train_realnet.py --dataset bricks --class_name bricks --overwrite --set net.backbone.kwargs.weights=random "
    f"--set net.afs.kwargs.init_bsn=8 --set trainer.max_step={STEPS} --set dataset.workers=0"
)

# %% [markdown]
# ## How good is it?
#
# The last lines of the output say how many pictures the detector gets wrong. With few held-out pictures, a false
# alarm rate of 1% cannot be promised; `--target-fpr 0.1` asks for one in ten.

# %%
run("evaluation_realnet.py --dataset bricks --class_name bricks --target-fpr 0.1")

# %% [markdown]
# `experiments/bricks/realnet_results/report.html` opens in a browser: curves, thresholds, and the worst errors first.
#
# ## New pictures
#
# One line per picture goes into `scores.csv`; 0.5 is the threshold. `heatmaps/` shows where, `masks/` which pixels.

# %%
run("predict.py --checkpoint experiments/bricks/realnet_checkpoints/bricks --input new --output results --overwrite")

# %%
with open(WORK / "results" / "scores.csv", newline="") as file:
    verdicts = {row["file"]: (float(row["score"]), row["verdict"]) for row in csv.DictReader(file)}
for name, (score, verdict) in verdicts.items():
    print(f"{name:20} {score:.3f}  {verdict}")
