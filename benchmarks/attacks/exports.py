"""Hostile .onnx and .pt2 files through predict.py. For benchmarks/mutants.py."""

import argparse
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import predict
from benchmarks.attacks.runs import ACCEPTED, Case, Outcome, Yard, command, flaws, trained
from utils.checkpoint import load_checkpoint
from utils.config import plain

PREDICTED = "data/tiny/images/dots/test/good"
THRESHOLDS = {"image": 0.5, "pixel": 0.5, "rule": "x", "low": 0.0, "high": 1.0, "fingerprint": "", "chosen_on": ""}


def nested(levels: int, inner: str = "1") -> str:
    return "[" * levels + inner + "]" * levels


def metadata_cases(config: dict) -> Iterator[tuple[str, dict[str, str], bool]]:
    """(name, metadata, whether it may be accepted) of an exported model."""
    good = {"config": json.dumps(config), "thresholds": json.dumps(THRESHOLDS), "fingerprint": "x"}
    yield "good", good, True
    for key in good:
        # The fingerprint only compares thresholds.
        yield f"no {key}", {name: value for name, value in good.items() if name != key}, False
        for label, text in {
            "60 levels": nested(60), "100000 levels": nested(100_000), "null": "null", "a list": "[1]", "text": '"x"',
            "a number": "7", "NaN": "NaN", "no JSON": "{", "empty": "", "surrogate": '"\\ud800"',
            "400 digits": "1" * 400,
            "5000 digits": "1" * 5000, "empty map": "{}", "map": '{"a": 1}', "NUL": '"\\u0000"',
        }.items():  # fmt: skip
            allowed = key == "fingerprint" or (key == "thresholds" and label in ("null", "empty map"))
            yield f"{key} {label}", {**good, key: text}, allowed
    changes: dict[str, Any] = {
        "image text": {"image": "0.5"}, "image nan": {"image": float("nan")}, "image inf": {"image": float("inf")},
        "image true": {"image": True}, "image list": {"image": [0.5]}, "image huge": {"image": 10**400},
        "low above high": {"low": 2.0, "high": 1.0}, "low huge": {"low": -1e308, "high": 1e308}, 
        "rule list": {"rule": [1]},
        "rule control": {"rule": "\x1b[2J"}, "classes list": {"classes": [1]}, "classes nested": {"classes": {"a": {
            **THRESHOLDS, "classes": {"b": THRESHOLDS}}}}, "classes odd": {"classes": {"../x": THRESHOLDS}},
        "missing low": {"low": None}, "fingerprint list": {"fingerprint": [1]},
    }  # fmt: skip
    harmless = ("rule", "classes nested", "classes odd", "fingerprint")
    for label, change in changes.items():
        yield (
            f"thresholds {label}",
            {**good, "thresholds": json.dumps({**THRESHOLDS, **change})},
            label.startswith(harmless),
        )
    size = json.loads(json.dumps(config))
    for value in ([10**6, 10**6], [32, 32], [0, 0], "64", [64.0, 64]):
        size["dataset"]["input_size"] = value
        yield f"config input_size {value}", {**good, "config": json.dumps(size)}, False


def graphs() -> Iterator[tuple[str, Any, bool]]:
    """(name, ONNX graph, whether it may be accepted)."""
    from onnx import TensorProto, helper

    def graph(
        shape: list[Any] | None = None,
        nodes: list[Any] | None = None,
        given: str = "image",
        result: str = "anomaly_map",
        kind: int = TensorProto.FLOAT,
        out: list[Any] | None = None,
        constants: list[Any] | None = None,
    ) -> Any:
        axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
        nodes = nodes or [
            helper.make_node("ReduceMean", [given, "axes"], ["mean"], keepdims=0),
            helper.make_node("Sigmoid", ["mean"], [result]),
        ]
        inputs = [helper.make_tensor_value_info(given, TensorProto.FLOAT, shape or ["N", 3, 64, 64])]
        outputs = [helper.make_tensor_value_info(result, kind, out or ["N", None, None])]
        return helper.make_graph(nodes, "g", inputs, outputs, [axes, *(constants or [])])

    mean = helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0)
    yield "good", graph(), True
    yield "batch of 1", graph([1, 3, 64, 64]), True
    yield "batch of 3", graph([3, 3, 64, 64]), False
    yield "32 x 32", graph(["N", 3, 32, 32]), False
    yield "any size", graph(["N", 3, "H", "W"]), True
    yield "one channel", graph(["N", 1, 64, 64]), False
    yield "other input", graph(given="x"), False
    yield "other output", graph(result="map"), False
    yield (
        "four dimensions",
        graph(nodes=[helper.make_node("Sigmoid", ["image"], ["anomaly_map"])], out=["N", 3, 64, 64]),
        False,
    )
    whole = [helper.make_node("ReduceMean", ["image"], ["anomaly_map"], keepdims=0)]
    yield "a number as map", graph(nodes=whole, out=[]), False
    log = [mean, helper.make_node("Log", ["mean"], ["anomaly_map"])]
    yield "nan as map", graph(nodes=log), False
    far = [mean, helper.make_node("Mul", ["mean", "mean"], ["m"]), helper.make_node("Exp", ["m"], ["anomaly_map"])]
    yield "map above 1", graph(nodes=far), False
    cast = [mean, helper.make_node("Cast", ["mean"], ["anomaly_map"], to=TensorProto.DOUBLE)]
    yield "float64", graph(nodes=cast, kind=TensorProto.DOUBLE), True
    cast = [mean, helper.make_node("Cast", ["mean"], ["anomaly_map"], to=TensorProto.STRING)]
    yield "text as map", graph(nodes=cast, kind=TensorProto.STRING), False
    cast = [mean, helper.make_node("Cast", ["mean"], ["anomaly_map"], to=TensorProto.BOOL)]
    yield "bool as map", graph(nodes=cast, kind=TensorProto.BOOL), False
    crop = [mean, helper.make_node("Slice", ["mean", "zero", "one"], ["anomaly_map"])]
    ends = [helper.make_tensor(n, TensorProto.INT64, [3], v) for n, v in (("zero", [0, 0, 0]), ("one", [99, 7, 5]))]
    yield "map of 7 x 5", graph(nodes=crop, constants=ends), False
    first = [mean, helper.make_node("Slice", ["mean", "zero", "one"], ["anomaly_map"])]
    ends = [helper.make_tensor(n, TensorProto.INT64, [1], v) for n, v in (("zero", [0]), ("one", [1]))]
    yield "map of the first image", graph(nodes=first, constants=ends), False
    large = helper.make_tensor("large", TensorProto.INT64, [3], [1, 10**6, 10**6])
    fill = [helper.make_node("ConstantOfShape", ["large"], ["anomaly_map"])]
    yield "4 TB as map", graph(nodes=[mean, *fill], constants=[large]), False
    yield "unknown operator", graph(nodes=[helper.make_node("Evil", ["image"], ["anomaly_map"], domain="x")]), False
    outside = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    outside.ClearField("float_data")
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../../../../etc/passwd"), ("offset", "0"), ("length", "4")):
        entry = outside.external_data.add()
        entry.key, entry.value = key, value
    add = [mean, helper.make_node("Add", ["mean", "w"], ["anomaly_map"])]
    yield "weights outside", graph(nodes=add, constants=[outside]), False


def write_onnx(path: Path, graph: Any, metadata: dict[str, str]) -> None:
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("x", 1)])
    model.ir_version = 9
    helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())


def exports(yard: Yard, args: argparse.Namespace) -> Iterator[Case]:
    """Every hostile exported model; good ones are made first."""
    import export

    list(trained(yard))
    checkpoint = yard.space / "experiments/tiny/realnet_checkpoints/dots/ckpt_best.pth.tar"
    config = plain(load_checkpoint(checkpoint)["config"])
    metadata = list(metadata_cases(config))
    good = metadata[0][1]
    for name, graph, allowed in graphs():
        write_onnx(yard.space / "x.onnx", graph, good)
        yield _predicted(yard, f"onnx graph {name}", yard.space / "x.onnx", allowed, args)
    small = next(graphs())[1]
    for name, texts, allowed in metadata:
        try:
            write_onnx(yard.space / "x.onnx", small, texts)
        except UnicodeError:
            continue
        yield _predicted(yard, f"onnx {name}", yard.space / "x.onnx", allowed, args)
    data = (yard.space / "x.onnx").read_bytes()
    for name, content in {"half": data[: len(data) // 2], "empty": b"", "text": b"hello", "zeros": bytes(999)}.items():
        (yard.space / "x.onnx").write_bytes(content)
        yield _predicted(yard, f"onnx {name}", yard.space / "x.onnx", False, args)

    options = ["--checkpoint", checkpoint, "--output", "exported", "--format", "torch"]
    outcome = command(export.main, options, yard.space, 240)
    if outcome.kind != ACCEPTED:
        yield Case("export of a .pt2", outcome, "; ".join(flaws(outcome)) or "refused")
        return
    program, attacked = yard.space / "exported/model.pt2", yard.space / "x.pt2"
    for name, texts, allowed in metadata:
        files = {f"extra/{key}": texts.get(key, "").encode("utf-8", "surrogatepass") for key in good}
        rewrite(program, attacked, {key: (lambda data, new=value: new) for key, value in files.items()})
        yield _predicted(
            yard, f"pt2 {name}", attacked, allowed or name in ("no fingerprint", "config input_size [32, 32]"), args
        )
    for name, change, allowed in weight_changes():
        rewrite(program, attacked, {"model_weights_config.json": change})
        yield _predicted(yard, f"pt2 weights {name}", attacked, allowed, args)
    rewrite(program, attacked, {"data/weights/": lambda data: data[: len(data) // 2]})
    yield _predicted(yard, "pt2 weights cut", attacked, False, args)
    rewrite(program, attacked, {"data/weights/weight": lambda data: b"\xff" * len(data)})
    yield _predicted(yard, "pt2 weights nan", attacked, False, args)
    rewrite(program, attacked, {}, zipfile.ZIP_DEFLATED)
    yield _predicted(yard, "pt2 compressed", attacked, False, args)
    for name, content in {"half": program.read_bytes()[:9999], "empty": b"", "text": b"hello"}.items():
        attacked.write_bytes(content)
        yield _predicted(yard, f"pt2 {name}", attacked, False, args)
    shutil.copy(checkpoint, attacked)
    yield _predicted(yard, "pt2 is a checkpoint", attacked, False, args)


def weight_changes() -> Iterator[tuple[str, Callable[[bytes], bytes], bool]]:
    """Changes of the first weight's description in a .pt2."""

    def with_meta(**change: Any) -> Callable[[bytes], bytes]:
        def call(data: bytes) -> bytes:
            content = json.loads(data)
            entry = next(entry for entry in content["config"].values() if len(entry["tensor_meta"]["sizes"]) == 4)
            for key, value in change.items():
                (entry if key == "path_name" else entry["tensor_meta"])[key] = value
            return json.dumps(content).encode()

        return call

    def ints(*values: Any) -> list[dict[str, Any]]:
        return [{"as_int": value} for value in values]

    yield "of 10**10 values", with_meta(sizes=ints(10**10), strides=ints(0)), False
    yield "of 2**31 values", with_meta(sizes=ints(2**29), strides=ints(0)), False
    yield "of -1 values", with_meta(sizes=ints(-1), strides=ints(1)), False
    yield "of 10**30 values", with_meta(sizes=ints(10**30), strides=ints(0)), False
    yield "sizes text", with_meta(sizes="x"), False
    yield "sizes floats", with_meta(sizes=ints(1.5), strides=ints(1)), False
    yield "negative stride", with_meta(strides=ints(-1, -1, -1, -1)), False
    yield "stride beyond", with_meta(strides=ints(10**6, 1, 1, 1)), False
    yield "negative offset", with_meta(storage_offset={"as_int": -1}), False
    yield "offset beyond", with_meta(storage_offset={"as_int": 10**9}), False
    yield "type 99", with_meta(dtype=99), False
    yield "type bool", with_meta(dtype=12), False
    yield "type int8", with_meta(dtype=2), False
    yield "other file", with_meta(path_name="../../../etc/passwd"), False
    yield "no JSON", lambda data: b"{", False
    yield "60 levels", lambda data: nested(60).encode(), False
    yield "100000 levels", lambda data: nested(100_000).encode(), False
    yield "empty", lambda data: b'{"config": {}}', False
    yield "a list", lambda data: b'{"config": [1]}', False


def rewrite(
    source: Path, target: Path, changes: dict[str, Callable[[bytes], bytes]], compression: int = zipfile.ZIP_STORED
) -> None:
    """Copy a zip file; the first member whose name holds a key is changed by its function."""
    left = dict(changes)
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", compression) as out:
        for info in archive.infolist():
            data = archive.read(info)
            key = next((key for key in left if key in info.filename), None)
            out.writestr(info.filename, left.pop(key)(data) if key else data)


def _predicted(yard: Yard, name: str, path: Path, allowed: bool, args: argparse.Namespace) -> Case:
    options = ["--checkpoint", path, "--input", PREDICTED, "--output", "out"]
    outcome = command(predict.main, options, yard.space, args.seconds)
    shutil.rmtree(yard.space / "out", ignore_errors=True)
    problems = flaws(Outcome(outcome.kind, outcome.code, outcome.message or outcome.out)) + yard.broken_out()
    if outcome.kind == ACCEPTED and not allowed:
        problems.append("accepted")
    return Case(name, outcome, "; ".join(problems))
