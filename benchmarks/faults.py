"""Fault tolerance, tested at length: kills, signals, hostile files, bad settings, full disks, dead ranks, leaks.

    python benchmarks/faults.py                  all points (about half an hour on two cores)
    python benchmarks/faults.py --only kills --kills 10

Works on copies of the demo data in a temporary folder, with small networks. Prints a table; the exit code is 1 if a
point does not hold.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.jobs import SMALL, Job, kill_tree, leftovers, result_of, run, same, start, train_for_sampling
from preparation.demo import make_demo
from utils.checkpoint import BEST, LAST, load_checkpoint
from utils.errors import UsageError

LEAK_WARM_UP = 200  # steps


# ---- points ----------------------------------------------------------------------------------------------------------


def kills(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Kill runs at random moments and resume them until done; the results must equal those of undisturbed runs."""
    rng = random.Random(0)
    jobs = [(script, ranks) for script in args.scripts for ranks in (1, 2)]
    for i, (script, ranks) in enumerate(jobs):
        if script == "sample.py":
            train_for_sampling(work)
        wanted = args.kills // len(jobs) + (i < args.kills % len(jobs))
        whole, killed = (Job(script, ranks, f"{name}{ranks}_{script[:-3]}") for name in ("whole", "killed"))
        began = time.monotonic()
        done = run(whole, work)
        took = time.monotonic() - began
        if done.returncode:
            yield f"{script}, {ranks} rank(s)", False, done.stderr.strip()[-200:]
            continue
        kill_count, different = 0, 0
        while kill_count < wanted:
            process = start(killed, work, *killed.resume)
            try:
                process.communicate(timeout=rng.uniform(0.5, took))
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
                process.communicate()
                kill_count += 1
                continue
            # The run ended before it was killed: compare its results, and start again.
            different += not same(result_of(whole, work), result_of(killed, work))
            shutil.rmtree(killed.folder(work))
        done = run(killed, work, *killed.resume)
        different += done.returncode != 0 or not same(result_of(whole, work), result_of(killed, work))
        clean = not leftovers(work)
        text = f"{kill_count} kills, then {'DIFFERENT' if different else 'identical'}{'' if clean else ', LEFTOVERS'}"
        yield f"{script}, {ranks} rank(s)", clean and not different, text


def sigterm(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Send SIGTERM to torchrun with two ranks: the run must save its state, end, and resume."""
    del args
    for script in ("train_diffusion.py", "train_classifier.py", "train_realnet.py"):
        job = Job(script, 2, f"term_{script[:-3]}")
        # Long enough to be still running when the signal comes.
        process = start(job, work, "--set", "trainer.max_epoch=400")
        wait(lambda job=job: (job.folder(work) / LAST).is_file(), process)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        out, _ = process.communicate(timeout=120)
        took = time.monotonic() - began
        announced = "SIGTERM: saved after step" in out
        resumed = run(job, work, "--resume")
        held = announced and resumed.returncode == 0 and "resumed" in resumed.stdout
        yield f"SIGTERM, {script}", held, f"ended after {took:.1f} s, {'resumed' if held else 'NOT resumed'}"


def dead_rank(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Kill one of two ranks: the job must end within a minute with a message."""
    del args
    for victim in (0, 1):
        job = Job("train_realnet.py", 2, f"dead{victim}")
        process = start(job, work)
        wait(lambda job=job: (job.folder(work) / LAST).is_file(), process)
        os.kill(ranks_of(process)[victim], signal.SIGKILL)
        began = time.monotonic()
        _, err = process.communicate(timeout=120)
        took = time.monotonic() - began
        explained = "connection to another rank is lost" in err or "Signal 9" in err
        yield f"rank {victim} killed", took < 60 and explained and process.returncode != 0, f"ended after {took:.1f} s"


def stopped_rank(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Stop one of two ranks, as a hanging host does: the job must end within two minutes and say why."""
    del args
    for victim in (0, 1):
        job = Job("train_realnet.py", 2, f"stopped{victim}")
        process = start(job, work, "--set", "trainer.max_epoch=4000")
        wait(lambda job=job: (job.folder(work) / LAST).is_file(), process)
        os.kill(ranks_of(process)[victim], signal.SIGSTOP)
        began = time.monotonic()
        _, err = process.communicate(timeout=300)
        took = time.monotonic() - began
        held = took < 120 and f"rank {victim} has not answered" in err and process.returncode != 0
        yield f"rank {victim} stopped", held, f"ended after {took:.1f} s"


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The process ids of the two ranks that torchrun has started."""
    command = ["ps", "-o", "pid=", "--ppid", str(launcher.pid)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in listing.stdout.split()][-2:]


def disk_full(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Fill the disk under checkpoints or images: the run must say so, damage nothing, and resume given space."""
    del args
    train_for_sampling(work)
    for script in ("train_classifier.py", "sample.py"):
        job = Job(script, 1, f"full_{script[:-3]}")
        place = job.folder(work) if script == "sample.py" else work / "experiments/demo" / job.stage
        with small_disk(place) as fill:
            if fill is None:
                yield f"disk full, {script}", True, "not tried: cannot mount a file system here"
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
            explained = process.returncode == 1 and "No space left on device" in err and "Traceback" not in err
            intact = script == "sample.py" or readable(place / LAST)
            fill.unlink()
            resumed = run(job, work, *job.resume)
            whole = Job(script, 1, f"whole1_{script[:-3]}")
            equal = same(result_of(whole, work), result_of(job, work)) if whole.folder(work).exists() else True
            held = explained and intact and resumed.returncode == 0 and equal
            yield f"disk full, {script}", held, "explained, intact, resumed, identical" if held else err.strip()[-160:]


def results_disk(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Predict and export onto a disk that is too small: one line, whole rows, and nothing half-written."""
    del args
    job = Job("train_realnet.py", 1, "predicted")
    assert run(job, work).returncode == 0
    checkpoint, images = str(job.folder(work) / BEST), "data/demo/images/brick/test"
    commands = {
        "predict": ["predict.py", "--input", images],
        "export": ["export.py", "--input", images, "--format", "torch"],
    }
    for what, (script, *options) in commands.items():
        place = work / f"full_{what}"
        with small_disk(place, "1m") as fill:
            if fill is None:
                yield f"disk full, {what}", True, "not tried: cannot mount a file system here"
                continue
            command = [sys.executable, str(ROOT / script), "--checkpoint", checkpoint, "--output", str(place), *options]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            explained = done.returncode == 1 and "No space left on device" in done.stderr
            explained = explained and len(done.stderr.splitlines()) == 1
            rows = (place / "scores.jsonl").read_bytes() if what == "predict" else b"{}\n"
            whole = rows.endswith(b"\n") and all(json.loads(line) is not None for line in rows.splitlines())
            clean = not list(place.rglob(".part-*")) and not (place / "model.pt2").exists()
            held = explained and whole and clean
            text = f"explained, {len(rows.splitlines())} whole rows" if held else done.stderr.strip()[-160:]
            yield f"disk full, {what}", held, text


def mutants(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """A short campaign of benchmarks/mutants.py: no survivors."""
    del args
    command = [
        sys.executable,
        str(ROOT / "benchmarks/mutants.py"),
        "--settings",
        "400",
        "--count",
        "20",
        "--bits",
        "100",
    ]
    done = subprocess.run([*command, "--work", str(work)], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    survivors = sum(line.startswith("  ") for line in lines)
    tried = sum(int(line.split()[1]) for line in lines[1:] if not line.startswith("  "))
    yield "mutants", done.returncode == 0, f"{tried} tried, {survivors} survivors {done.stderr.strip()[-100:]}"


def readable(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except UsageError:
        return False
    return True


@contextmanager
def small_disk(place: Path, size: str = "60m") -> Iterator[Path | None]:
    place.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False, capture_output=True
    )
    try:
        yield place / "fill" if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(place)], check=False)


def leak(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Fit a line to resident memory over 2000 steps of the small detector: it must grow by at most 2 %.

    By default glibc keeps a varying part of the freed memory, some percent; here it is set to return all of it.
    """
    del args
    job = Job("train_realnet.py", 1, "leak")
    extra = ["trainer.max_epoch=140", "trainer.val_freq_epoch=140", "trainer.print_freq_step=20", "dataset.workers=0"]
    glibc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    process = start(job, work, *(part for setting in extra for part in ("--set", setting)), **glibc)
    sizes: dict[int, int] = {}
    for line in process.stdout:
        if "  step " in line:
            step = int(line.split("  step ")[1].split("/")[0])
            sizes[step] = resident(process.pid)
    process.wait()
    steps = np.array([step for step in sizes if step >= LEAK_WARM_UP])
    if len(steps) < 10:
        yield "memory over 2000 steps", False, process.stderr.read().strip()[-160:]
        return
    values = np.array([sizes[step] for step in steps]) / 2**20
    slope, start_size = np.polyfit(steps - steps[0], values, 1)
    growth = 2000 * slope / start_size
    text = f"{values.min():.0f} .. {values.max():.0f} MiB in steps {steps[0]} .. {steps[-1]}: {100 * growth:+.2f} %"
    yield "memory over 2000 steps", growth <= 0.02 and steps[-1] >= 2000, text


def resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def suites(work: Path, args: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """Run the tests with hostile files, and with two hundred bad settings and lists."""
    del work, args
    for what, files in {
        "hostile checkpoints": ["tests/scripts/test_hostile_files.py"],
        "bad settings and lists": ["tests/scripts/test_bad_settings.py", "tests/preparation/test_broken_files.py"],
    }.items():
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        yield what, done.returncode == 0, done.stdout.strip().splitlines()[-1]


def wait(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 180
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


POINTS = {
    "kills": kills,
    "sigterm": sigterm,
    "rank": dead_rank,
    "stopped": stopped_rank,
    "disk": disk_full,
    "results": results_disk,
    "leak": leak,
    "suites": suites,
    "mutants": mutants,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(POINTS), nargs="+", default=list(POINTS))
    parser.add_argument("--scripts", nargs="+", choices=list(SMALL), default=list(SMALL), help="scripts to kill")
    parser.add_argument("--kills", type=int, default=50, help="total number of kills (default 50)")
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
