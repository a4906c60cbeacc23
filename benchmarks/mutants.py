"""Attacks by the thousand: settings, checkpoints, archives, images and names that are wrong on purpose.

    python benchmarks/mutants.py                          all families (about half an hour on two cores)
    python benchmarks/mutants.py --only settings training --settings 2500
    python benchmarks/mutants.py --only bits --log outcomes.jsonl

Runs the commands in this process, in a temporary workspace with small networks. Prints a line per family, `family tried
refused accepted tracebacks hangs`, then the survivors: what was refused badly, was accepted and should not have been,
or wrote where it should not. The exit code is 1 if there is one.
"""

import argparse
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import sample
import train_classifier
import train_diffusion
import train_realnet
from benchmarks.attacks import archives, checkpoints, images, names
from benchmarks.attacks.runs import (
    ACCEPTED,
    HANG,
    REFUSED,
    TRACEBACK,
    Case,
    Yard,
    attempt,
    command,
    flaws,
    inside,
    trained,
)
from benchmarks.attacks.settings import Mutant, legitimate, mutants
from models.sdas.sampler import check_networks
from utils.checkpoint import load_checkpoint
from utils.config import collect_errors, load_config

passed: list[Mutant] = []  # those that settings_family has accepted
MEMORY = 12 * 2**30  # bytes; above this, an allocation fails instead of taking the machine down


# ---- settings --------------------------------------------------------------------------------------------------------


def check_file(stage: str, path: Path) -> None:
    """Load a settings file and run the checks of its script, as its main does before anything is trained."""
    config = load_config(path, (), stage)
    if stage == "realnet":
        train_realnet.check(config, path, "dots")
    elif stage == "sample":
        options = ("strength", "sampler", "steps", "seed", "no_classifier", "preview", "quality", "reconstruct")
        sample.apply_arguments(config, argparse.Namespace(**dict.fromkeys(options)), path)
        collect_errors(path, [("TestSampler", lambda: sample.SpacedDiffusion(**config.TestSampler))])
        check_networks(config, path)
    else:
        {"diffusion": train_diffusion, "classifier": train_classifier}[stage].check(config, path)


def settings_family(yard: Yard, args: argparse.Namespace) -> Iterator[Case]:
    """Mutants of the settings files: refused with a message that names file and key, or rightly accepted."""
    passed.clear()
    with inside(yard.space):
        for i, mutant in enumerate(mutants(yard.space, args.settings, args.seed)):
            path = yard.write(Path(f"experiments/mutants/m{i}.yaml"), mutant.config)
            outcome = attempt(lambda mutant=mutant, path=path: check_file(mutant.stage, path), args.seconds)
            path.unlink()
            if outcome.kind == ACCEPTED:
                passed.append(mutant)
                survivor = "" if legitimate(mutant) else "accepted"
            elif mutant.label == "unchanged":
                raise RuntimeError(f"the good settings are refused: {outcome.message}")
            else:
                # One line per problem: a misspelt key that is required is two.
                survivor = "; ".join(flaws(outcome, 6, (path.name, mutant.key)))
            yield Case(mutant.name, outcome, survivor)


# ---- training --------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "diffusion": train_diffusion.main,
    "classifier": train_classifier.main,
    "realnet": train_realnet.main,
    "sample": sample.main,
}
SHORT = ("trainer.max_epoch", "dataset.workers", "dataset.cache_mb", "sample_number")


def training_family(yard: Yard, args: argparse.Namespace) -> Iterator[Case]:
    """Accepted mutants, trained for two steps: they end well or with a message, and never with weights of nan."""
    list(trained(yard))
    if not passed:
        list(settings_family(yard, args))
    accepted = [mutant for mutant in passed if ".".join(map(str, mutant.path)) not in SHORT]
    random.Random(args.seed).shuffle(accepted)
    # Those that should not have been accepted first: they are the likelier to fail.
    accepted.sort(key=legitimate)
    half = [mutant for mutant in accepted if not legitimate(mutant)][: args.count // 2]
    chosen = half + [mutant for mutant in accepted if legitimate(mutant)][: args.count - len(half)]
    for i, mutant in enumerate(chosen):
        case = yard.space / f"experiments/case{i}"
        path = yard.write(case / f"{mutant.stage}.yaml", mutant.config)
        outcome = command(SCRIPTS[mutant.stage], ["--config", path, *short_run(mutant.stage)], yard.space, args.seconds)
        problems = flaws(outcome) + yard.broken_out()
        if outcome.kind == ACCEPTED:
            problems += not_finite(case)
            problems += ["ends well, but steps were skipped (loss not finite)"] * ("steps skipped" in outcome.out)
        yield Case(mutant.name, outcome, "; ".join(problems))
        shutil.rmtree(case)
        shutil.rmtree(yard.space / "data/tiny/sdas", ignore_errors=True)


def short_run(stage: str) -> list[str]:
    """Options that make a run two steps long."""
    if stage == "sample":
        return ["--set", "sample_number=2"]
    batch = ["--class_name", "dots", "--set", "dataset.batch_size=2"] if stage == "realnet" else []
    return ["--set", "trainer.max_epoch=1", "--set", "dataset.workers=0", *batch]


def not_finite(folder: Path) -> list[str]:
    """The checkpoints below a folder whose weights are not finite."""
    found = []
    for path in folder.rglob("*.pth.tar"):
        state = load_checkpoint(path)["state_dict"]
        if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
            found.append(f"{path.name} holds weights that are not finite")
    return found


# ---- bits ------------------------------------------------------------------------------------------------------------


def bits_family(yard: Yard, args: argparse.Namespace) -> Iterator[Case]:
    """A checkpoint with one bit flipped: refused, or loaded bit for bit as it was."""
    list(trained(yard))
    path = yard.space / "experiments/tiny/classifier_checkpoints/ckpt_1.pth.tar"
    data, content = path.read_bytes(), load_checkpoint(path)
    rng, places = random.Random(args.seed), interesting_bytes(path)
    flipped = yard.space / "flipped.pth.tar"
    for i in range(args.bits):
        # A third anywhere, which is in the weights; the others in headers, directory and pickle.
        byte = rng.randrange(len(data)) if i % 3 == 0 else rng.choice(places)
        bit = rng.randrange(8)
        changed = bytearray(data)
        changed[byte] ^= 1 << bit
        flipped.write_bytes(changed)
        loaded: list[Any] = []
        outcome = attempt(lambda loaded=loaded: loaded.append(load_checkpoint(flipped)), args.seconds)
        problems = flaws(outcome)
        if outcome.kind == ACCEPTED and not identical(content, loaded[0]):
            problems.append("loaded with another content")
        yield Case(f"byte {byte} of {len(data)}, bit {bit}", outcome, "; ".join(problems))


def interesting_bytes(path: Path) -> list[int]:
    """The bytes of a zip file that are not weights: headers, the pickle and small members, and the directory."""
    data, found = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
            begin = info.header_offset
            body = begin + 30 + name + extra
            found += range(begin, body)
            if "/data/" not in info.filename:
                found += range(body, body + info.compress_size)
        found += range(archive.start_dir, len(data))
    return found


def identical(a: Any, b: Any) -> bool:
    """Whether two contents are equal bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    if torch.is_tensor(a):
        same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return same and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    return bool(a == b or (a != a and b != b))


# ---- all -------------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[Yard, argparse.Namespace], Iterator[Case]]] = {
    "settings": settings_family,
    "training": training_family,
    "bits": bits_family,
    "checkpoints": checkpoints.checkpoints_family,
    "archives": archives.archives_family,
    "images": images.images_family,
    "names": names.names_family,
}


def run_family(name: str, args: argparse.Namespace) -> int:
    """Run one family and print its line and survivors; returns the number of survivors."""
    counts: Counter[str] = Counter()
    survivors: dict[str, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for case in FAMILIES[name](Yard(Path(folder)), args):
            counts[case.outcome.kind] += 1
            if args.log:
                record = {"family": name, **vars(case), "outcome": vars(case.outcome)}
                with open(args.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record, default=str) + "\n")
            if case.survivor:
                survivors[case.survivor].append(case.name)
    numbers = [sum(counts.values()), *(counts[kind] for kind in (REFUSED, ACCEPTED, TRACEBACK, HANG))]
    print(f"{name:12}" + "".join(f"{number:12}" for number in numbers), flush=True)
    for what, cases in survivors.items():
        for case_name in cases:
            print(f"  {case_name.encode('unicode_escape').decode()}: {what.encode('unicode_escape').decode()}")
    return sum(map(len, survivors.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(FAMILIES), nargs="+", default=list(FAMILIES))
    parser.add_argument("--settings", type=int, default=2400, help="mutants of settings files (default 2400)")
    parser.add_argument("--count", type=int, default=200, help="accepted mutants to train (default 200)")
    parser.add_argument("--bits", type=int, default=500, help="bits to flip (default 500)")
    parser.add_argument("--seconds", type=float, default=10.0, help="after which a case counts as a hang (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for the workspaces (default: the system's temporary one)")
    parser.add_argument("--log", type=Path, help="file to which every outcome is added, as a line of JSON")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    print("family            tried     refused    accepted  tracebacks       hangs", flush=True)
    sys.exit(sum(run_family(name, args) for name in args.only) > 0)


if __name__ == "__main__":
    main()
