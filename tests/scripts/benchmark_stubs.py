"""Stand-ins for the scripts that a benchmark's cells run: same options and files, a hundred times faster."""

from pathlib import Path

# Its "network" is one number, which depends on class and seed and changes with every step.
TRAIN = """
import json, os, random, signal, sys, time
from pathlib import Path
from filelock import FileLock

words = sys.argv[1:]
settings = dict(word.partition("=")[::2] for option, word in zip(words, words[1:]) if option == "--set")
name, seed = words[words.index("--class_name") + 1], int(settings["random_seed"])
steps, pause = int(settings["trainer.max_epoch"]), float(os.environ.get("STUB_PAUSE", 0.01))
folders = {key: Path(json.loads(settings[f"saver.{key}"])) / name for key in ("checkpoints_dir", "log_dir")}
for folder in folders.values():
    folder.mkdir(parents=True, exist_ok=True)
if os.environ.get("STUB_FAILS") == f"{name} {seed}":
    sys.exit("error: the loss is not finite")
last, best = (folders["checkpoints_dir"] / f"ckpt_{kind}.pth.tar" for kind in ("last", "best"))
if last.exists() and "--resume" not in words:
    sys.exit("error: holds the checkpoints of an earlier run")
stop = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
with FileLock(folders["checkpoints_dir"] / ".lock.guard", blocking=False):
    state = json.loads(last.read_text()) if last.exists() else {"step": 0, "best": -1}
    while state["step"] < steps:
        time.sleep(pause)
        state["step"] += 1
        value = random.Random(f"{name} {seed} {state['step']}").random()
        if value >= state["best"]:
            best.write_text(json.dumps({"value": value}))
        state |= {"best": max(value, state["best"]), "value": value}
        part = last.with_name("part")
        part.write_text(json.dumps(state))
        part.replace(last)
        with open(folders["log_dir"] / "train_realnet.jsonl", "a") as log:
            for line in ({"peak_memory_GiB": 0.5}, {"validation": {"image_auroc": value}}):
                log.write(json.dumps({"epoch": 1, "step": state["step"], **line}) + "\\n")
        if stop:
            sys.exit(128 + stop[0])
"""
EVALUATE = """
import json, sys
from pathlib import Path

words = sys.argv[1:]
settings = dict(word.partition("=")[::2] for option, word in zip(words, words[1:]) if option == "--set")
value = json.loads(Path(words[words.index("--checkpoint") + 1]).read_text())["value"]
folder = Path(json.loads(settings["saver.results_dir"]))
folder.mkdir(parents=True, exist_ok=True)
row = {"image_auroc": value, "pixel_auroc": value / 2, "pro": None, "image_threshold": 0.3}
(folder / "metrics.json").write_text(json.dumps({words[words.index("--class_name") + 1]: row, "mean": row}))
"""
COST = """
import json, sys
from pathlib import Path

cost = {"parameters": 3_000_000, "ms_per_image_1": 2.0, "ms_per_image_16": 1.0, "input_size": [64, 64]}
cost |= {"device": "cpu", "threads": 1, "backbone": "resnet18", "weights": "x.pth", "weights_sha256": "ab" * 32}
Path(sys.argv[sys.argv.index("--output") + 1]).write_text(json.dumps(cost))
"""


def write_stubs(root: Path) -> Path:
    """Write the stand-ins as a repository of their own; returns its folder."""
    for name, text in (("train_realnet.py", TRAIN), ("evaluation_realnet.py", EVALUATE), ("evaluation/cost.py", COST)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root
