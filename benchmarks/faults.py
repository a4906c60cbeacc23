"""The long form of what must survive: kills, signals, hostile files, bad settings, full disks, dead ranks, leaks.

    python benchmarks/faults.py                  all points (about half an hour on two cores)
    python benchmarks/faults.py --only kills --kills 10

Works on copies of the demo data in a temporary folder, with the networks made small. Prints a table; exit code 1 where
a point does not hold.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from preparation.demo import make_demo
from utils.checkpoint import load_checkpoint
from utils.errors import UsageError
from utils.resume import LAST

LEAK_WARM_UP = 200  # steps
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
    """A script with small settings, on one or two ranks, whose outputs go to a folder of its own."""

    script: str
    ranks: int
    stage: str

    def command(self, *arguments: str) -> list[str]:
        launcher = TORCHRUN if self.ranks == 2 else []
        own = [f"saver.checkpoints_dir={self.stage}/", f"saver.log_dir={self.stage}_log/"]
        own += [f"workspace.root={self.stage}"] if self.script == "sample.py" else [f"saver.vis_dir={self.stage}_vis/"]
        settings = [part for setting in [*SMALL[self.script], *own] for part in ("--set", setting)]
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
    """SIGKILL a process and all below it: a launcher puts its ranks into process groups of their own."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listing.splitlines())
    doomed, found = {pid}, True
    while found:
        found = {child for child, parent in parents.items() if parent in doomed} - doomed
        doomed |= found
    for victim in doomed:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def result_of(job: Job, work: Path) -> dict[str, object]:
    """What has to be the same: weights and optimiser of a training, pictures of a sampling."""
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
    """The diffusion model that sample.py draws with; trained where a point needs it first."""
    if not (work / "trained").exists():
        job = Job("train_diffusion.py", 1, "sampled_from")
        assert run(job, work).returncode == 0
        shutil.copytree(job.folder(work), work / "trained")


def leftovers(work: Path) -> list[Path]:
    return [path for pattern in (".part-*", ".lock", "ckpt_next*") for path in work.rglob(pattern)]


# ---- points ----------------------------------------------------------------------------------------------------------


def kills(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """SIGKILL at random moments, resumed until done, against undisturbed runs."""
    rng = random.Random(0)
    jobs = [(script, ranks) for script in args.scripts for ranks in (1, 2)]
    for i, (script, ranks) in enumerate(jobs):
        if script == "sample.py":
            train_for_sampling(work)
        mine = args.kills // len(jobs) + (i < args.kills % len(jobs))
        whole, killed = (Job(script, ranks, f"{what}{ranks}_{script[:-3]}") for what in ("whole", "killed"))
        began = time.monotonic()
        done = run(whole, work)
        took = time.monotonic() - began
        if done.returncode:
            yield f"{script}, {ranks} rank(s)", False, done.stderr.strip()[-200:]
            continue
        hit, different = 0, 0
        while hit < mine:
            process = start(killed, work, *killed.resume)
            try:
                process.communicate(timeout=rng.uniform(0.5, took))
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
                process.communicate()
                hit += 1
                continue
            # Done before it was killed: compared, and begun anew.
            different += not same(result_of(whole, work), result_of(killed, work))
            shutil.rmtree(killed.folder(work))
        done = run(killed, work, *killed.resume)
        different += done.returncode != 0 or not same(result_of(whole, work), result_of(killed, work))
        clean = not leftovers(work)
        text = f"{hit} kills, then {'DIFFERENT' if different else 'identical'}{'' if clean else ', LEFTOVERS'}"
        yield f"{script}, {ranks} rank(s)", clean and not different, text


def sigterm(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """SIGTERM to torchrun with two ranks: saved, ended, resumed."""
    del args
    for script in ("train_diffusion.py", "train_classifier.py", "train_realnet.py"):
        job = Job(script, 2, f"term_{script[:-3]}")
        # Long enough not to be done when the signal comes.
        process = start(job, work, "--set", "trainer.max_epoch=400")
        wait(lambda job=job: (job.folder(work) / LAST).is_file(), process)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        out, _ = process.communicate(timeout=120)
        took = time.monotonic() - began
        told = f"signal {int(signal.SIGTERM)}: saved after step" in out
        resumed = run(job, work, "--resume")
        held = told and resumed.returncode == 0 and "resumed" in resumed.stdout
        yield f"SIGTERM, {script}", held, f"ended after {took:.1f} s, {'resumed' if held else 'NOT resumed'}"


def dead_rank(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """One of two ranks killed: the job ends within a minute with a message."""
    del args
    for victim in (0, 1):
        job = Job("train_realnet.py", 2, f"dead{victim}")
        process = start(job, work)
        wait(lambda job=job: (job.folder(work) / LAST).is_file(), process)
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
        )
        os.kill([int(line) for line in found.stdout.split()][-2:][victim], signal.SIGKILL)
        began = time.monotonic()
        _, err = process.communicate(timeout=120)
        took = time.monotonic() - began
        told = "connection to another rank is lost" in err or "Signal 9" in err
        yield f"rank {victim} killed", took < 60 and told and process.returncode != 0, f"ended after {took:.1f} s"


def disk_full(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """A small tmpfs under checkpoints and under pictures: a message, the state before intact, resumed with space."""
    del args
    train_for_sampling(work)
    for script in ("train_classifier.py", "sample.py"):
        job = Job(script, 1, f"full_{script[:-3]}")
        place = job.folder(work) if script == "sample.py" else work / "experiments/demo" / job.stage
        with small_disk(place) as fill:
            if fill is None:
                yield f"disk full, {script}", True, "not tried: this machine mounts no file system"
                continue
            process = start(job, work)
            pattern = "rank*.jpg" if script == "sample.py" else LAST
            wait(lambda place=place, pattern=pattern: any(place.glob(pattern)), process)
            fill.write_bytes(b"")
            with open(fill, "ab", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            _, err = process.communicate(timeout=300)
            told = process.returncode == 1 and "No space left on device" in err and "Traceback" not in err
            intact = script == "sample.py" or readable(place / LAST)
            fill.unlink()
            resumed = run(job, work, *job.resume)
            whole = Job(script, 1, f"whole1_{script[:-3]}")
            equal = same(result_of(whole, work), result_of(job, work)) if whole.folder(work).exists() else True
            held = told and intact and resumed.returncode == 0 and equal
            yield f"disk full, {script}", held, "told, intact, resumed, identical" if held else err.strip()[-160:]


def readable(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except UsageError:
        return False
    return True


@contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    place.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(place)], check=False, capture_output=True
    )
    try:
        yield place / "fill" if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(place)], check=False)


def leak(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Resident memory over 2000 steps of the small detector, by a line fitted to it.

    glibc keeps some percent more or less of what is freed, as threads and sizes happen to fall: here it gives all back.
    """
    del args
    job = Job("train_realnet.py", 1, "leak")
    more = ["trainer.max_epoch=140", "trainer.val_freq_epoch=140", "trainer.print_freq_step=20", "dataset.workers=0"]
    frugal = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    process = start(job, work, *(part for setting in more for part in ("--set", setting)), **frugal)
    sizes: dict[int, int] = {}
    for line in process.stdout:
        if "  step " in line:
            step = int(line.split("  step ")[1].split()[0])
            sizes[step] = resident(process.pid)
    process.wait()
    steps = np.array([step for step in sizes if step >= LEAK_WARM_UP])
    if len(steps) < 10:
        yield "memory over 2000 steps", False, process.stderr.read().strip()[-160:]
        return
    values = np.array([sizes[step] for step in steps]) / 2**20
    slope, start_size = np.polyfit(steps - steps[0], values, 1)
    grown = 2000 * slope / start_size
    text = f"{values.min():.0f} .. {values.max():.0f} MiB in steps {steps[0]} .. {steps[-1]}: {100 * grown:+.2f} %"
    yield "memory over 2000 steps", grown <= 0.02 and steps[-1] >= 2000, text


def resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def suites(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Hostile files and two hundred bad settings and lists, as the tests have them."""
    del work, args
    for what, files in {
        "pickles that run a command": ["tests/scripts/test_hostile_files.py"],
        "bad settings and lists": ["tests/scripts/test_bad_settings.py", "tests/preparation/test_broken_files.py"],
    }.items():
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        yield what, done.returncode == 0, done.stdout.strip().splitlines()[-1]


def wait(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 180
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


POINTS = {"kills": kills, "sigterm": sigterm, "rank": dead_rank, "disk": disk_full, "leak": leak, "suites": suites}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(POINTS), nargs="+", default=list(POINTS))
    parser.add_argument("--scripts", nargs="+", choices=list(SMALL), default=list(SMALL), help="to kill")
    parser.add_argument("--kills", type=int, default=50, help="in all (default 50)")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_demo(work / "data/demo")
        shutil.copytree(ROOT / "experiments/demo", work / "experiments/demo", ignore=shutil.ignore_patterns("*_*"))
        for point in args.only:
            for what, held, text in POINTS[point](work, args):
                failed += not held
                print(f"{'holds' if held else 'FAILS'}  {what:32} {text}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
