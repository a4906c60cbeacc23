"""Names of classes, folders and files that attack shells, terminals, tables and paths. For benchmarks/mutants.py."""

import argparse
import copy
import csv
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import evaluation_realnet
import predict
import prepare_data
import train_realnet
from benchmarks.attacks.runs import ACCEPTED, REFUSED, Case, Outcome, Yard, command, flaws
from datasets.lists import listed_classes
from tests.conftest import settings, texture

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = [
    "x|;e touch OWNED;#", "$(touch OWNED)", "`touch OWNED`", "a;touch OWNED", "a && touch OWNED", "a\ntouch OWNED",
    "a\nb", "a\rb", "a\tb", "\x1b[2J", "\x1b]0;x\x07", "\x07", "\x9b2J", "=1+1", "+1", "-1", "@SUM(A1)", "-rf",
    "--help",
    "..", "...", ".hidden", "~", "~root", "*", "?", "[a]", "a b", " a", "a ", "a.", "x" * 200, "x" * 201, "x" * 250, 
    "零件",
    "部" * 66, "部" * 67, "\u202egnp", "\u2066x", "a\u200bb", "a\u2028b", "e\u0301", "\u00e9", "'", '"', "a'b\"c", "\\",
    "a\\b", "{}", "{0}", "{x", "a,b", "all", "uni", "mean", "ALL", "Mean", "%s%n%x", "%(message)s", "$HOME", "#", "#1",
    "!x", "&", "<script>alert(1)<", "</td>", "a|b", "a:b", "CON", "nul", "NaN", "null", "true", "1e5", "0x1F", "good",
    "train", "test", "ground_truth", "a%2Fb", "\U0001f600", "\ufeffx", "\ufffe", "a\x7fb", "a\x00b"[:1], "caf\udce9",
]  # fmt: skip
CONTROL = range(32)


def parts(root: Path, name: str) -> None:
    """A class of that name, with good and bad images; a defect type and an image have the name too."""
    rng = np.random.default_rng(0)
    folders = {f"{name}/train/good": 4, f"{name}/test/good": 2, f"{name}/test/{name}": 2}
    for folder, count in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = texture("dots", rng)
            if folder.endswith(f"test/{name}"):
                image[10:30, 10:30] = rng.integers(0, 255, 3)
            Image.fromarray(image).save(root / folder / f"{i}.png")
    spare = root / f"{name}/test/good" / f"{name[:100]}.png"
    if not spare.exists():
        Image.fromarray(texture("dots", rng)).save(os.fsencode(spare).decode("utf-8", "surrogateescape"))


def names_family(yard: Yard, args: argparse.Namespace) -> Iterator[Case]:
    """Every name through prepare_data.py and, if accepted, through all that follows."""
    for i, name in enumerate(dict.fromkeys(NAMES)):
        root = yard.space / "in"
        shutil.rmtree(root, ignore_errors=True)
        try:
            parts(root, name)
        except (OSError, ValueError):
            continue  # the file system has no such name
        data = f"N{i}"
        # The first way takes the name from a folder below --root, the second one from --root itself.
        for way, given in (("below", root), ("root", root / name)):
            for left in (f"data/{data}", f"experiments/{data}"):
                shutil.rmtree(yard.space / left, ignore_errors=True)
            outcome = command(prepare_data.main, ["--dataset", data, "--root", given], yard.space, args.seconds)
            problems = _flaws(outcome, yard)
            classes = listed_classes(str(yard.space / f"data/{data}/samples/train_{{}}.json"))
            if outcome.kind == ACCEPTED and len(classes) == 1:
                problems += _printed(outcome.out, classes[0], yard)
            yield Case(f"prepare {way} {name!r}", outcome, "; ".join(problems))
        if outcome.kind == REFUSED and not classes:
            continue
        for class_name in classes:
            yield from _used(yard, data, class_name, args)
        for left in (f"data/{data}", f"experiments/{data}"):
            shutil.rmtree(yard.space / left, ignore_errors=True)


def _used(yard: Yard, data: str, name: str, args: argparse.Namespace) -> Iterator[Case]:
    """Train a step on a class, evaluate, and predict."""
    config = copy.deepcopy(settings("data/tiny", "experiments/tiny")["realnet"])
    config["dataset"]["image_reader"]["kwargs"]["image_dir"] = f"data/{data}/images"
    for split in ("train", "test"):
        config["dataset"][split]["meta_file"] = f"data/{data}/samples/{split}_{{}}.json"
    config["trainer"]["max_epoch"] = 1
    yard.write(yard.space / f"experiments/{data}/realnet.yaml", config)
    options = ["--dataset", data, f"--class_name={name}"]
    outcome = command(train_realnet.main, options, yard.space, args.seconds)
    yield Case(f"train {name!r}", outcome, _wrong(outcome, yard))
    if outcome.kind != ACCEPTED:
        return
    outcome = command(evaluation_realnet.main, options, yard.space, args.seconds)
    yield Case(f"evaluate {name!r}", outcome, _wrong(outcome, yard, yard.space / f"experiments/{data}"))
    checkpoint = yard.space / f"experiments/{data}/realnet_checkpoints" / name
    options = ["--checkpoint", checkpoint, "--input", "in", "--output", f"experiments/{data}/out"]
    outcome = command(predict.main, options, yard.space, args.seconds)
    yield Case(f"predict {name!r}", outcome, _wrong(outcome, yard, yard.space / f"experiments/{data}"))
    shell = f'source <(sed -n "/^name_lines()/,/^}}/p" "{ROOT}/run.sh"); printf "line\\n" | name_lines "$1"'
    done = subprocess.run(["bash", "-c", shell, "bash", name], cwd=yard.space, capture_output=True, check=False)
    text = done.stdout.decode(errors="replace")
    wrong = yard.broken_out() + [f"name_lines prints {text!r}"] * (text != f"[{name}] line\n") + [done.stderr.decode()]
    yield Case(f"name_lines {name!r}", Outcome(ACCEPTED, 0, "", text), "; ".join(filter(None, wrong)))


def _flaws(outcome: Outcome, yard: Yard) -> list[str]:
    said = Outcome(outcome.kind, outcome.code, outcome.message or outcome.out, outcome.out)
    found = [text for text in flaws(said, 12) if "letters" not in text] + yard.broken_out()
    if any(ord(letter) in CONTROL and letter not in "\n\t" for letter in outcome.out + outcome.message):
        found.append("control characters on the terminal")
    if any(letter in outcome.out + outcome.message for letter in "\u202e\u2066\x9b"):
        found.append("letters that steer the terminal")
    return found


def _wrong(outcome: Outcome, yard: Yard, folder: Path | None = None) -> str:
    """What is wrong with how a command on an accepted name ended, and with the tables and pages it wrote."""
    problems = _flaws(outcome, yard)
    # Hidden folders and masks below the input are not scored.
    if outcome.kind == REFUSED and "holds no image" not in outcome.message:
        problems.append(f"refused: {outcome.message.strip()[:150]}")
    for path in folder.rglob("*.csv") if folder else ():
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        # Numbers may be negative.
        bad = [cell for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r", "-")) and not _number(cell)]
        problems += [f"{path.name} holds the formula {cell!r}" for cell in bad[:1]]
    for path in folder.rglob("*.html") if folder else ():
        if "<script>alert" in path.read_text(encoding="utf-8", errors="replace"):
            problems.append("report.html holds a script")
    return "; ".join(problems)


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _printed(out: str, name: str, yard: Yard) -> list[str]:
    """What is wrong with the commands that prepare_data.py prints: in a shell, they have to pass the class on."""
    commands = [line.strip() for line in out.splitlines() if line.startswith("  python ") and "--class_name" in line]
    found = [] if commands else ["prints no command with the class"]
    for line in commands:
        shell = f"python() {{ printf '%s\\0' \"$@\"; }}; {line}"
        done = subprocess.run(["bash", "-c", shell], cwd=yard.space, capture_output=True, check=False)
        arguments = [os.fsdecode(part) for part in done.stdout.split(b"\0")]
        if name not in arguments and f"--class_name={name}" not in arguments:
            found.append(f"the printed command passes {arguments}")
    return list(dict.fromkeys(found)) + yard.broken_out()
