# %% [markdown]
# # Anomalies as files: SDAS from training to pairs of image and mask
#
# A diffusion model learns what good images look like, and draws anomalous ones with a larger sampling variance, 1 +
# s. This example trains a tiny one, draws images with it, measures them, and writes pairs of image and mask that
# other programs can train on.
#
#     python examples/synthesis.py            # a tiny model; real ones need a GPU and hours
#     python examples/synthesis.py --quick    # a few steps: the pictures are noise
#
# Everything is written to `examples_output/synthesis/`, below the folder where this is started.

# %%
import csv
import shlex
import subprocess
import sys
from pathlib import Path

QUICK = "--quick" in sys.argv  # in a notebook: True or False
# A notebook has no __file__; it runs in the folder that it lies in.
REPOSITORY = Path(globals().get("__file__", "notebook.ipynb")).resolve().parent.parent
WORK = Path("examples_output", "synthesis_quick" if QUICK else "synthesis").resolve()
WORK.mkdir(parents=True, exist_ok=True)
sys.path.insert(0, str(REPOSITORY))


def run(command: str) -> None:
    """Run a script of the repository in the folder WORK, as one would in a terminal there."""
    print(f"\n$ python {command}", flush=True)
    script, *arguments = shlex.split(command)
    if subprocess.run([sys.executable, str(REPOSITORY / script), *arguments], cwd=WORK).returncode:
        sys.exit(f"this command has failed: {command}")


# %% [markdown]
# ## Good images
#
# Tiles of scikit-image's photograph of grass, 64 x 64 pixels each. A folder with good images only is enough.

# %%
from skimage import data as photographs

from utils.pictures import write_image

SIDE = 64
photograph = photographs.grass()[: 256 if QUICK else 512]
for row in range(photograph.shape[0] // SIDE):
    for column in range(photograph.shape[1] // SIDE):
        tile = photograph[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        write_image(WORK / "tiles" / f"{row}_{column}.png", tile)

run("prepare_data.py --dataset grass --root tiles --preset quick --diffusion small --input-size 32 32")

# %% [markdown]
# ## Training the diffusion model
#
# The settings are in `experiments/grass/diffusion.yaml`; `--set` makes the network and the training smaller still.
# The loss falls quickly at first. Whether a model is trained enough, its loss does not tell, but the quality below
# does.

# %%
STEPS = 4 if QUICK else 400
run(
    "train_diffusion.py --dataset grass --overwrite --set unet.channel_mult=[1,2] --set unet.attention_resolutions=[2] "
    f"--set trainer.max_step={STEPS} --set trainer.val_freq_epoch=1000 --set trainer.val_kid_images=0 "
    "--set trainer.val_batch_number=1 --set dataset.workers=0"
)

# %% [markdown]
# ## Images over the strength
#
# The strip shows the same noise at s = 0 .. 0.3: choose the range of s by it. Then images are drawn, which
# `train_realnet.py` blends into good ones (anomaly type `sdas`).

# %%
NUMBER, EVALUATIONS = (4, 3) if QUICK else (16, 10)
run(f"sample.py --dataset grass --preview --steps {EVALUATIONS}")
run(f"sample.py --dataset grass --strength 0.1 0.2 --overwrite --steps {EVALUATIONS} --set sample_number={NUMBER}")
print("Look at", WORK / "experiments/grass/sample_vis/grass.png", "and", WORK / "data/grass/sdas/grass")

# %% [markdown]
# ## Is it trained enough?
#
# The quality is measured in the features of a network: KID is the distance to the training images, 0 for the row
# `real` within its error. Far above, as here, more training is needed. With pretrained weights (without the two
# `--set` of features) the numbers say more. `experiments/grass/sample_vis/quality/quality.html` plots them over s.

# %%
if not QUICK:
    run(
        "sample.py --dataset grass --quality --quality-images 16 --steps 10 "
        "--set features.backbone=resnet18 --set features.weights=random"
    )

# %% [markdown]
# ## Pairs of image and mask
#
# `synthesize.py` writes training's own anomalies as files, at the images' own size: here images drawn by SDAS, and
# patches of other good images. `preview.png` shows some of them.

# %%
PAIRS = 4 if QUICK else 20
run(f"synthesize.py --dataset grass --types sdas=0.5,cutpaste=0.5 --count {PAIRS} --output pairs --overwrite")

# %% [markdown]
# `--source edit` does not blend: the diffusion model draws a region of the good image again, and everything outside
# the mask stays as it was. The larger the depth and the strength, the less is left of what was there.

# %%
run(
    f"synthesize.py --dataset grass --source edit --depth 0.5 0.8 --strength 0.3 0.8 --count {PAIRS} --output edits "
    "--overwrite"
)

# %% [markdown]
# `pairs.csv` says how each pair was made. The folders are a data set in MVTec's layout, with the good images beside
# the pairs: `prepare_data.py --root pairs` reads them, and so do other programs.

# %%
for folder in ("pairs", "edits"):
    with open(WORK / folder / "grass" / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    print(f"\n{WORK / folder / 'grass'}: {len(rows)} pairs, such as")
    for key in ("image", "mask", "good", "type", "opacity"):
        print(f"  {key:8} {rows[0][key]}")
