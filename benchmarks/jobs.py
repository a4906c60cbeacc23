"""Runs of the scripts with small settings, which benchmarks/faults.py starts, kills and compares."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.checkpoint import LAST, load_checkpoint

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
UNET = ["dataset.input_size=[16, 16]", "dataset.batch_size=8", "trainer.accumulate=2", "trainer.save_freq_step=5"]
SMALL = {
    "train_diffusion.py": [
        *UNET, "trainer.max_epoch=4", "trainer.val_freq_epoch=4",
        "unet.classifier_width=32", "unet.num_head_channels=32",
    ],
    "train_classifier.py": [
        *UNET, "trainer.max_epoch=8", "trainer.val_freq_epoch=8", "trainer.save_freq_epoch=4",
        "classifier.classifier_width=32", "classifier.num_head_channels=32",
    ],
    "sample.py": [
        "dataset.H=16", "dataset.W=16", "dataset.batch_size=4", "sample_number=200", "classifier=null",
        "unet.classifier_width=32", "unet.num_head_channels=32", "unet.pertrain_path=trained/",
    ],
    "train_realnet.py": [
        "dataset.input_size=[64, 64]", "trainer.max_epoch=4", "trainer.val_freq_epoch=2", "trainer.save_freq_step=5",
        "net.afs.kwargs.init_bsn=4", "dataset.train.anomaly_types={normal: 0.5, dtd: 0.5}",
    ],
}  # fmt: skip


@dataclass
class Job:
    """A script with small settings, on one or two ranks, with its own output folder."""

    script: str
    ranks: int
    stage: str

    def command(self, *arguments: str) -> list[str]:
        launcher = TORCHRUN if self.ranks == 2 else []
        dirs = [f"saver.checkpoints_dir={self.stage}/", f"saver.log_dir={self.stage}_log/"]
        dirs += [f"workspace.root={self.stage}"] if self.script == "sample.py" else [f"saver.vis_dir={self.stage}_vis/"]
        settings = [part for setting in [*SMALL[self.script], *dirs] for part in ("--set", setting)]
        one_class = ["--class_name", "brick"] if self.script in ("sample.py", "train_realnet.py") else []
        return [
            sys.executable,
            *launcher,
            str(ROOT / self.script),
            "--dataset",
            "demo",
            *one_class,
            *settings,
            *arguments,
        ]

    @property
    def resume(self) -> list[str]:
        return [] if self.script == "sample.py" else ["--resume"]

    def folder(self, work: Path) -> Path:
        if self.script == "sample.py":
            return work / self.stage / "brick"
        return work / "experiments/demo" / self.stage / ("brick" if self.script == "train_realnet.py" else "")


def run(job: Job, work: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(job.command(*arguments), cwd=work, capture_output=True, text=True, timeout=900, check=False)


def start(job: Job, work: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(job.command(*arguments), cwd=work, env={**os.environ, **environment}, **pipes)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and its descendants: a launcher's ranks are in other process groups than the launcher."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listing.splitlines())
    doomed, children = {pid}, {pid}
    while children:
        children = {child for child, parent in parents.items() if parent in doomed} - doomed
        doomed |= children
    for victim in doomed:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def result_of(job: Job, work: Path) -> dict[str, object]:
    """The results to compare: weights and optimiser state of a training run, images of a sampling run."""
    folder = job.folder(work)
    if job.script == "sample.py":
        return {path.name.partition("_")[2]: path.read_bytes() for path in folder.glob("rank*.jpg")}
    content = load_checkpoint(folder / LAST)
    flat = {f"weight {name}": value for name, value in content["state_dict"].items()}
    flat |= {f"average {name}": value for name, value in content.get("ema_state_dict", {}).items()}
    for key, state in content["stepper"]["optimizer"]["state"].items():
        flat |= {f"optimiser {key} {name}": value for name, value in state.items()}
    return flat


def same(first: dict[str, object], second: dict[str, object]) -> bool:
    def equal(a: object, b: object) -> bool:
        return torch.equal(a, b) if torch.is_tensor(a) else a == b

    return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)


def train_for_sampling(work: Path) -> None:
    """Train the diffusion model for sample.py, unless an earlier point has trained it."""
    if not (work / "trained").exists():
        job = Job("train_diffusion.py", 1, "sampled_from")
        assert run(job, work).returncode == 0
        shutil.copytree(job.folder(work), work / "trained")


def leftovers(work: Path) -> list[Path]:
    return [path for pattern in (".part-*", ".lock", "ckpt_next*") for path in work.rglob(pattern)]
