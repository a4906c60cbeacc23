"""Hostile checkpoints through every command that reads one. For benchmarks/mutants.py."""

import argparse
import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import evaluation_realnet
import predict
import sample
import train_diffusion
import train_realnet
from benchmarks.attacks.raw import fuzzed, raw_files
from benchmarks.attacks.runs import ACCEPTED, Case, Outcome, Yard, command, trained, verdict
from utils.checkpoint import load_checkpoint

FUZZED = 80
PREDICTED = "data/tiny/images/dots/test/good"


# ---- weights --------------------------------------------------------------------------------------------

WEIGHTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "meta": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64) + 1j,
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t > 0,
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "nan": lambda t: torch.full(t.shape, torch.nan),
    "one nan": lambda t: t.double().index_fill(0, torch.tensor([0]), torch.nan),
    "inf": lambda t: torch.full(t.shape, torch.inf),
    "huge": lambda t: torch.full(t.shape, 3e38),
    "float64 huge": lambda t: torch.full(t.shape, 1e300, dtype=torch.float64),
    "flat": lambda t: t.flatten(),
    "one more dimension": lambda t: t[None],
    "empty": lambda t: t.flatten()[:0],
    "a scalar": lambda t: torch.tensor(0.5),
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 0.5,
    "text": lambda t: "weights",
    "null": lambda t: None,
}
HARMLESS: dict[str, Callable[[torch.Tensor], Any]] = {
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "a parameter": lambda t: torch.nn.Parameter(t.float()),
    "other strides": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}
# A variance has one dimension and may be large.
FITTING = (("variance", "flat"), ("variance", "huge"))
INDICES: dict[str, Callable[[torch.Tensor], Any]] = {
    "out of range": lambda t: t + 10_000,
    "negative": lambda t: -1 - t,
    "repeated": lambda t: torch.zeros_like(t),
    "fractions": lambda t: t + 0.5,
    "float": lambda t: t.float(),
    "nan": lambda t: torch.full(t.shape, torch.nan),
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t > 3,
    "complex": lambda t: t.to(torch.complex64),
    "huge": lambda t: torch.full_like(t, 2**62),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}


def changed(content: dict, path: tuple, value: Any) -> dict:
    """The content with another value at a path; a callable value is applied to the old one."""
    content = dict(content)
    if len(path) > 1:
        content[path[0]] = changed(content[path[0]], path[1:], value)
    elif value is missing:
        del content[path[0]]
    else:
        content[path[0]] = value(content[path[0]]) if callable(value) else value
    return content


def missing() -> None:
    """Stands for a key that is taken out."""


def weight_cases(content: dict) -> Iterator[tuple[str, dict, bool]]:
    """(name, content, whether it may be accepted): each kind of weight replaced in each way."""
    names = list(content["state_dict"])
    kinds = {
        "convolution": next(n for n in names if "backbone" in n and n.endswith("weight")),
        "variance": next(n for n in names if n.endswith("running_var")),
        "reconstruction": next(n for n in names if n.startswith("recon") and content["state_dict"][n].dim() == 4),
        "head": [n for n in names if n.startswith("rrs") and n.endswith("weight")][-1],
    }
    for label, make in {**WEIGHTS, **HARMLESS}.items():
        for kind, name in kinds.items():
            yield (
                f"{kind} {label}",
                changed(content, ("state_dict", name), make),
                label in HARMLESS or (kind, label) in FITTING,
            )
    counter = next((n for n in names if n.endswith("num_batches_tracked")), None)
    for label, value in (("nan", torch.tensor(torch.nan)), ("negative", torch.tensor(-5)), ("text", "x")):
        if counter:
            yield f"batch counter {label}", changed(content, ("state_dict", counter), value), label == "negative"
    index = next(n for n in names if n.startswith("afs.indexes"))
    for label, make in INDICES.items():
        yield f"AFS {label}", changed(content, ("state_dict", index), make), label == "float"
    yield "variance negative", changed(content, ("state_dict", kinds["variance"]), lambda t: -t - 1), False


# ---- checkpoints: the rest -------------------------------------------------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def laughs() -> Any:
    """Lists of lists: 10**9 values in a few bytes."""
    value: Any = [1] * 10
    for _ in range(8):
        value = [value] * 10
    return value


JUNK: dict[str, Any] = {
    "null": None, "a list": [1], "text": "x", "a number": 7, "nan": float("nan"), "a tensor": torch.zeros(3),
    "an empty map": {}, "deep": deep(60), "laughs": laughs(), "a map": {"../../x": 1}, "numbers as keys": {1: 2},
    "null as key": {None: 1},
}  # fmt: skip
NAMES = ["../../x", "/tmp/x", "a\0b", "\x1b[2J", "a\nb", "", "x" * 300, "-rf", "\ud800", "all"]


def content_cases(content: dict) -> Iterator[tuple[str, dict, bool]]:
    """Settings and figures of other kinds, for commands that use a trained network."""
    for key in ("config", "arch", "epoch", "state_dict", "best_metric", "classes"):
        for label, value in JUNK.items():
            # Only the weights and settings are needed; the others are for people.
            allowed = key not in ("config", "state_dict") and label not in ("deep", "laughs")
            allowed |= key == "config" and label not in ("deep", "laughs", "an empty map", "a map", "numbers as keys")
            yield f"{key} {label}", changed({key: None, **content}, (key,), value), allowed
        if key in content:
            yield f"{key} missing", changed(content, (key,), missing), key not in ("state_dict",)
    size = ("config", "dataset", "input_size")
    for value in ([10**6, 10**6], [10**12, 64], [0, 64], [-64, 64], "64", [64.5, 64], [1, 1], [True, True]):
        yield f"input_size {value}", changed(content, size, value), value == [1, 1]
    yield (
        "image_dir deep",
        changed(content, ("config", "dataset", "image_reader", "kwargs", "image_dir"), deep(9)),
        False,
    )
    window = {"auc": [{"name": "image", "kwargs": {"avgpool_size": [10**12, 10**12]}}]}
    yield "window of 10**12", changed(content, ("config", "evaluator", "metrics"), window), False
    for label, value in (("text", "auc"), ("list", [1]), ("texts", {"auc": ["x"]}), ("window text", {"auc": [
        {"name": "image", "kwargs": {"avgpool_size": "16"}}]})):  # fmt: skip
        yield f"metrics {label}", changed(content, ("config", "evaluator", "metrics"), value), False
    for label, value in (("stride 10**9", {"stride": 10**9}), ("name ../x", {"name": "../x"}),
                         ("name a.b", {"name": "a.b"}),
                         ("no layers", {"layers": []})):  # fmt: skip
        block = {**content["config"]["structure"][0], **value}
        yield f"structure {label}", changed(content, ("config", "structure"), [block]), False
    for i, kwargs in ((2, {"num_res_blocks": 10**6}), (3, {"num_residual_layers": 10**6}),
                      (3, {"mode_numbers": [10**9] * 2}), (2, {"channel_mult": [10**9, 1]}),
                      (0, {"backbone": "/etc/passwd"}),
                      (3, {"dropout": deep(3)})):  # fmt: skip
        net = copy.deepcopy(content["config"]["net"])
        net[i]["kwargs"].update(kwargs)
        yield f"net {kwargs}"[:60], changed(content, ("config", "net"), net), False


def resume_cases(content: dict) -> Iterator[tuple[str, dict, bool]]:
    """Positions, optimiser states and figures of other kinds, for --resume."""
    values = {"negative": -3, "huge": 10**30, "text": "x", "nan": float("nan"), "null": None, "a list": [1],
              "True": True, "fraction": 0.5, "missing": missing}  # fmt: skip
    for key in ("epoch", "step", "step_in_epoch"):
        for label, value in values.items():
            yield f"position.{key} {label}", changed(content, ("position", key), value), False
    yield "position.step_in_epoch beyond", changed(content, ("position", "step_in_epoch"), 10**6), False
    optimizer = ("stepper", "optimizer")
    state = content["stepper"]["optimizer"]["state"]
    first = next(iter(state))
    for label, make in {**WEIGHTS, "transposed": lambda t: t.flatten()[None]}.items():
        for key in ("exp_avg", "exp_avg_sq"):
            entry = {**state[first], key: make(state[first][key])}
            yield f"optimiser {key} {label}", changed(content, (*optimizer, "state", first), entry), False
    for label, value in (
        ("text", "x"),
        ("negative", torch.tensor(-5.0)),
        ("nan", torch.tensor(torch.nan)),
        ("null", None),
    ):
        entry = {**state[first], "step": value}
        yield f"optimiser step {label}", changed(content, (*optimizer, "state", first), entry), False
    yield (
        "optimiser variance negative",
        changed(content, (*optimizer, "state", first), {**state[first], "exp_avg_sq": -1 - state[first]["exp_avg_sq"]}),
        False,
    )
    for label, value in JUNK.items():
        for path in (
            ("position",),
            ("stepper",),
            optimizer,
            (*optimizer, "state"),
            (*optimizer, "param_groups"),
            ("run",),
        ):
            allowed = path == ("run",) and label not in ("deep", "laughs")
            yield f"{'.'.join(path)} {label}", changed(content, path, value), allowed
    for label, value in JUNK.items():
        key = "best_metric" if "best_metric" in content else "epoch_loss"
        yield f"{key} {label}", changed(content, (key,), value), False
    for name in ("ema_state_dict", "classes"):
        for label, value in JUNK.items():
            if name in content:
                yield f"{name} {label}", changed(content, (name,), value), name == "classes" and label == "null"


def sampling_cases(content: dict) -> Iterator[tuple[str, dict, bool]]:
    """Class names and settings of a diffusion checkpoint that would lead sample.py elsewhere."""
    for name in NAMES:
        yield f"class {name[:20]!r}", changed(content, ("classes",), [name, "plain"]), False
    yield "classes twice", changed(content, ("classes",), ["a", "a"]), False
    for key in ("classes", "arch", "process", "input_size", "ema_state_dict"):
        for label, value in JUNK.items():
            if key in content:
                yield f"{key} {label}", changed(content, (key,), value), key in ("process", "input_size")
    for path, value in (
        (("process", "T"), 10**12), (("process", "T"), -1), (("process", "beta_scheduler"), "const1"),
        (("process", "beta_scheduler"), deep(3)), (("input_size",), [10**9, 10**9]), (("input_size",), [-16, 16]),
        (("input_size",), ["16", 16]), (("arch", "class_number"), 10**12), (("arch", "classifier_width"), 10**9),
        (("arch", "channel_mult"), [10**9, 1]), (("arch", "channel_mult"), "12"), (("arch", "num_head_channels"), 0),
        (("arch", "classifier_depth"), 10**6), (("arch", "dropout"), float("nan")), (("arch", "learn_sigma"), "no"),
    ):  # fmt: skip
        yield f"{'.'.join(path)} {value}"[:50], changed(content, path, value), path == ("input_size",)
    weights = "ema_state_dict" if "ema_state_dict" in content else "state_dict"
    name = next(n for n, t in content[weights].items() if t.dim() == 4)
    for label, make in {**WEIGHTS, **HARMLESS}.items():
        yield f"weight {label}", changed(content, (weights, name), make), label in HARMLESS


def checkpoints_family(yard: Yard, args: argparse.Namespace) -> Iterator[Case]:
    """Hostile checkpoints through every command that reads one."""
    list(trained(yard))
    tiny = yard.space / "experiments/tiny"
    best, last = (tiny / f"realnet_checkpoints/dots/ckpt_{name}.pth.tar" for name in ("best", "last"))
    drawn = tiny / "diffusion_checkpoints/ckpt_1.pth.tar"
    bad, resumed = yard.space / "bad.pth.tar", tiny / "resumed"
    dots, folders = ["--dataset", "tiny", "--class_name", "dots"], ["--set", "saver.checkpoints_dir=resumed/"]

    def predicted(path: Path) -> Outcome:
        shutil.rmtree(yard.space / "out", ignore_errors=True)
        options = ["--checkpoint", path, "--input", PREDICTED, "--output", "out"]
        return command(predict.main, options, yard.space, args.seconds)

    def evaluated(path: Path) -> Outcome:
        options = [*dots, "--checkpoint", path, "--no-pictures", "--set", "saver.log_dir=attacked_log"]
        return command(evaluation_realnet.main, options, yard.space, args.seconds)

    def sampled(path: Path) -> Outcome:
        shutil.rmtree(yard.space / "data/tiny/sdas", ignore_errors=True)
        options = ["--dataset", "tiny", "--set", f"unet.pertrain_path={path}", "--set", "sample_number=1"]
        return command(sample.main, [*options, "--no-classifier"], yard.space, args.seconds)

    def resumption(main: Callable, options: list[str], folder: Path) -> Callable[[Path], Outcome]:
        def call(path: Path) -> Outcome:
            shutil.rmtree(resumed, ignore_errors=True)
            folder.mkdir(parents=True)
            shutil.copy(path, folder / "ckpt_last.pth.tar", follow_symlinks=False)
            options_ = [*options, "--resume", *folders, "--set", "trainer.max_epoch=2"]
            return command(main, options_, yard.space, args.seconds)

        return call

    content, resumable = load_checkpoint(best), load_checkpoint(last)
    diffusion = load_checkpoint(tiny / "diffusion_checkpoints/ckpt_last.pth.tar")
    resume_realnet = resumption(train_realnet.main, dots, resumed / "dots")
    resume_diffusion = resumption(train_diffusion.main, ["--dataset", "tiny"], resumed)
    plans = [
        ("predict", predicted, [*weight_cases(content), *content_cases(content)]),
        ("evaluate", evaluated, [*weight_cases(content)][::3] + [*content_cases(content)][::4]),
        ("resume realnet", resume_realnet, [*resume_cases(resumable), *weight_cases(resumable)]),
        ("resume diffusion", resume_diffusion, [*resume_cases(diffusion)][::2]),
        ("sample", sampled, [*sampling_cases(load_checkpoint(drawn))]),
    ]
    for what, call, cases in plans:
        for name, attacked, allowed in cases:
            try:
                torch.save(attacked, bad)
            except Exception:
                continue  # torch cannot write it, so nobody can send it this way
            outcome = call(bad)
            survivor = verdict(outcome, yard, allowed)
            if outcome.kind == ACCEPTED and what.startswith("resume") and "best_metric" in resumable:
                survivor = survivor or _spoiled(resumed)
            yield Case(f"{what}: {name}", outcome, survivor)
    for what, call, good in (
        ("predict", predicted, best),
        ("resume realnet", resume_realnet, last),
        ("sample", sampled, drawn),
    ):
        for name, path, allowed in raw_files(good, yard.space):
            if what.startswith("resume") and name == "FIFO":
                continue  # cannot be copied
            outcome = call(path)
            yield Case(f"{what}: {name}", outcome, verdict(outcome, yard, allowed))
        for i in range(FUZZED):
            outcome = call(fuzzed(good, bad, args.seed + i))
            yield Case(f"{what}: fuzzed pickle {args.seed + i}", outcome, verdict(outcome, yard, True))


def _spoiled(folder: Path) -> str:
    """What is not finite in the checkpoints that a resumed run wrote."""
    for path in folder.rglob("ckpt_last.pth.tar"):
        state = load_checkpoint(path)["state_dict"]
        if not all(bool(t.isfinite().all()) for t in state.values()):
            return "resumed, and saved weights that are not finite"
    return ""
