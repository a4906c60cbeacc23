# %% [markdown]
# # A benchmark: data in MVTec's layout, two seeds, one table
#
# One training says little: another seed gives other figures, and the paper's protocol chooses the checkpoint on the
# test images. `benchmark.py` trains every class with every seed and prints means, deviations, and what that choice
# was worth.
#
#     python examples/benchmark_mvtec.py
#     python examples/benchmark_mvtec.py --quick    # a few steps, to see that everything runs
#
# Everything is written to `examples_output/benchmark_mvtec/`, below the folder where this is started.

# %%
import json
import shlex
import subprocess
import sys
from pathlib import Path

QUICK = "--quick" in sys.argv  # in a notebook: True or False
# A notebook has no __file__; it runs in the folder that it lies in.
REPOSITORY = Path(globals().get("__file__", "notebook.ipynb")).resolve().parent.parent
WORK = Path("examples_output", "benchmark_mvtec_quick" if QUICK else "benchmark_mvtec").resolve()
WORK.mkdir(parents=True, exist_ok=True)
sys.path.insert(0, str(REPOSITORY))


def run(command: str) -> None:
    """Run a script of the repository in the folder WORK, as one would in a terminal there."""
    print(f"\n$ python {command}", flush=True)
    script, *arguments = shlex.split(command)
    if subprocess.run([sys.executable, str(REPOSITORY / script), *arguments], cwd=WORK).returncode:
        sys.exit(f"this command has failed: {command}")


# %% [markdown]
# ## The data
#
# The demo's classes brick and gravel lie in MVTec's layout: `<class>/train/good`, `<class>/test/<defect>`, and
# `<class>/ground_truth/<defect>/<name>_mask.png`. For MVTec AD itself, give `--dataset MVTec-AD --root` its folder or
# archive: its lists are checked against the published counts, and its settings are there already.

# %%
from preparation.demo import make_class

for name in ("brick", "gravel"):
    make_class(WORK / "mvtec", name, seed=0)

# %%
run("prepare_data.py --dataset two --root mvtec --preset quick --backbone resnet18 --input-size 64 64")

# %% [markdown]
# A list has one line of JSON per image. These lists are what the reference program reads, too.

# %%
with open(WORK / "data/two/samples/test_brick.json", encoding="utf-8") as file:
    lines = file.read().splitlines()
print(*lines[:1], *lines[-1:], sep="\n")

# %% [markdown]
# ## Two classes, two seeds
#
# Each of the four cells is a training and two evaluations, in processes of their own. After Ctrl-C, the same command
# goes on. Nothing is downloaded here, so the weights are random; leave out the `--set` for figures that count.

# %%
EPOCHS = 1 if QUICK else 5
BENCHMARK = (
    "benchmark.py --dataset two --class_name brick,gravel --seeds 100 101 --set net.backbone.kwargs.weights=random "
    f"--set net.afs.kwargs.init_bsn=8 --set trainer.max_epoch={EPOCHS} --set dataset.workers=0"
)
run(BENCHMARK)

# %% [markdown]
# ## The table, read by a program
#
# `experiments/two/benchmark/` has it as CSV, JSON, Markdown and a page. `test` is the checkpoint that was chosen on
# the test images as in the paper, `no_test` the one that was chosen without them, and `gap` how much the former
# flatters. A share of 1 is 100%.

# %%
content = json.loads((WORK / "experiments/two/benchmark/benchmark.json").read_text(encoding="utf-8"))
for line in content["lines"]:
    for choice in ("test", "no_test", "gap"):
        figure = line["figures"][f"image_auroc_{choice}"]
        print(f"{line['name']:8} image AUROC, {choice:8} {figure['mean']:.4f} ± {figure['deviation']:.4f}")

# %% [markdown]
# Finished cells are kept: this prints the same table without training anything. `--variant NAME:KEY=VALUE` compares
# settings.

# %%
run(f"{BENCHMARK} --report-only")
