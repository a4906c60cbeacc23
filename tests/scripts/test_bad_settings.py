"""Two hundred bad settings, made by changing good ones: each ends the run at once, and the error names file and key."""

import copy
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import yaml

import sample
import train_classifier
import train_diffusion
import train_realnet
from tests.conftest import settings
from tests.in_process import run

SCRIPTS = {
    "diffusion": train_diffusion,
    "classifier": train_classifier,
    "sample": sample,
    "realnet": train_realnet,
}
PER_SCRIPT = 50
# Keys that take any value, or whose wrong values show only later.
FREE = ("name", "type", "sdas_dir", "dtd_dir", "results_dir", "foreground", "section_counts")


def leaves(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values that are not sections."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        for i, value in enumerate(node):
            yield from leaves(value, (*path, i))
    else:
        yield path


def at(config: Any, path: tuple) -> Any:
    for key in path:
        config = config[key]
    return config


def wrong_values(value: Any) -> list[Any]:
    """Values that are wrong in place of this one."""
    if isinstance(value, bool):
        return ["perhaps", 3, [True]]
    if isinstance(value, (int, float)):
        return ["many", -7, float("nan"), float("inf"), [value, value], {"a": 1}]
    if isinstance(value, str):
        return [17, ["a", "b"], {"a": 1}, True]
    if isinstance(value, list):
        return ["list", 3, [], ["x"] * len(value), {"a": 1}, [-5] * (len(value) or 1)]
    return []


def mutations(stage: str) -> list[tuple[str, dict, str]]:
    """(what was changed, settings, text that the message must contain), the same in every run."""
    good = settings("data/tiny", "experiments/tiny")[stage]
    cases = []
    for path in leaves(good):
        key = str(next(part for part in reversed(path) if isinstance(part, str)))
        parent, value = path[:-1], at(good, path)
        if key in FREE or path[0] in ("net", "structure", "criterion"):
            continue
        for wrong in wrong_values(value):
            changed = copy.deepcopy(good)
            at(changed, parent)[path[-1]] = wrong
            cases.append((f"{'.'.join(map(str, path))} = {wrong!r}", changed, key))
        changed = copy.deepcopy(good)
        del at(changed, parent)[path[-1]]
        at(changed, parent)[f"{key}x"] = value
        cases.append((f"{'.'.join(map(str, path))} misspelt", changed, f"{key}x"))
    for path, wrong, key in SEMANTIC.get(stage, []):
        changed = copy.deepcopy(good)
        at(changed, path[:-1])[path[-1]] = wrong
        cases.insert(0, (f"{'.'.join(map(str, path))} = {wrong!r}", changed, key))
    special = len(SEMANTIC.get(stage, []))
    order = np.random.default_rng(zlib.crc32(stage.encode())).permutation(len(cases) - special) + special
    chosen = [cases[i] for i in [*range(special), *order][:PER_SCRIPT]]
    # Without cases, pytest would skip the test.
    assert len({name for name, _, _ in chosen}) == PER_SCRIPT, stage
    return chosen


SEMANTIC = {
    "realnet": [
        (("structure", 0, "layers", 0, "planes"), 65, "block1 keeps 65 of layer1, which has 64 channels"),
        (("structure", 0, "layers", 0, "planes"), 0, "structure.block1.layers.layer1.planes: 0 has to be at least 1"),
        (("structure", 0, "layers", 0, "idx"), "layer9", "layer9"),
        (("structure", 0, "stride"), 0, "structure.block1.stride: 0"),
        (("structure",), [], "structure"),
        (("net",), [], "net: needs a part named backbone"),
        (("net", 0, "kwargs", "backbone"), "resnet1000", "resnet1000"),
        (("net", 1, "kwargs", "init_bsn"), 0, "init_bsn"),
        (("net", 2, "kwargs", "channel_mult"), "wide", "net"),
        (("net", 2, "kwargs"), {"blocks": 3}, "blocks"),
        (("net", 3, "kwargs", "mode_numbers"), [8], "mode_numbers"),
        (("net", 3, "kwargs", "mode_numbers"), [8, 800], "mode_numbers"),
        (("net", 3, "type"), "os.system", "net"),
        (("criterion", 0, "type"), "Loss", "criterion"),
        (("criterion", 0, "kwargs"), {"wait": 1}, "criterion"),
        (("dataset", "train", "anomaly_types"), {"normal": 0.5, "dtd": 0.6}, "add up to 1.1"),
        (("dataset", "train", "anomaly_types"), {"normal": 0.5, "dust": 0.5}, "dust"),
        (("dataset", "train", "anomaly_types"), {"normal": 1.0}, "nothing to learn from"),
        (("dataset", "train", "anomaly_types"), {"normal": 0.5, "sdas": 0.5}, "sdas_dir"),
        (("dataset", "train", "dtd_dir"), "data/nowhere", "dtd_dir"),
        (("dataset", "foreground"), "sometimes", "dataset.foreground"),
        (("trainer", "optimizer", "type"), "Adamant", "Adamant"),
        (("trainer", "amp"), "maybe", "amp"),
    ],
    "diffusion": [
        (("dataset", "input_size"), [17, 16], "the nearest is [16, 16]"),
        (("unet", "class_number"), 1, "unet.class_number: 1, but"),
        (("unet", "classifier_width"), 33, "multiple of 32"),
        (("TestSampler", "section_counts"), "ddim7000", "section_counts"),
        (("TrainSampler", "beta_scheduler"), "steep", "beta_scheduler"),
        (("trainer", "optimizer", "kwargs"), {"speed": 1}, "trainer.optimizer.kwargs"),
        (("trainer", "optimizer", "kwargs"), {"lr": -1.0}, "trainer.optimizer.kwargs"),
    ],
    "classifier": [
        (("classifier", "classifier_pool"), "mean", "classifier_pool"),
        (("classifier", "num_head_channels"), 48, "1 attention head of 48 channels"),
    ],
    "sample": [
        (("TestSampler", "section_counts"), [5, "x"], "section_counts"),
        (("TestSampler", "section_counts"), "logsnr1001", "section_counts"),
        (("sampler",), "dpmpp", "sampler"),
        (("sampler",), "dpmpp_2m", "strength: [0.1, 0.2] has no effect"),
    ],
}
CASES = [(stage, *case) for stage in SCRIPTS for case in mutations(stage)]


IDS = [f"{stage} {name}" for stage, name, _, _ in CASES]


@pytest.mark.parametrize(("stage", "config", "key"), [(stage, config, key) for stage, _, config, key in CASES], ids=IDS)
def test_bad_settings_are_named_before_anything_starts(stage, config, key, workspace, tmp_path, monkeypatch, capsys):
    path = tmp_path / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["--config", str(path)] + (["--class_name", "dots"] if stage == "realnet" else [])
    code, out, err = run(SCRIPTS[stage].main, arguments, workspace.root, monkeypatch, capsys)
    assert code == 2, out + err
    assert key in err, err
    assert path.name in err or "--class_name" in err, err
    assert "epoch" not in out
    assert [other.name for other in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0", "0.1"], "--strength: [0.0, 0.1] has no effect with sampler dpmpp_2m"),
        (["--strength", "0", "0", "--preview"], "--preview draws a strip over s"),
        (["--strength", "0", "0", "--steps", "2000"], "logsnr keeps 1 to 1000 steps, not 2000"),
    ],
)
def test_a_sampler_without_noise_has_no_strength(arguments, message, workspace, monkeypatch, capsys):
    arguments = ["--dataset", "tiny", "--sampler", "dpmpp_2m", *arguments]
    code, _, err = run(sample.main, arguments, workspace.root, monkeypatch, capsys)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quality-images", "8"], "--quality-images needs --quality"),
        (["--preview", "--strength", "0", "1"], "--strength has no effect on --preview, which goes through strengths"),
        (["--quality", "--strength", "0", "1"], "--strength has no effect on --quality"),
        (["--reconstruct", "a.png", "--strength", "0", "1"], "--strength has no effect on --reconstruct"),
    ],
)
def test_options_of_sample_that_would_do_nothing_are_refused(arguments, message, workspace, monkeypatch, capsys):
    code, _, err = run(sample.main, ["--dataset", "tiny", *arguments], workspace.root, monkeypatch, capsys)
    assert code == 2
    assert message in err


def test_all_mistakes_are_in_one_message(workspace, monkeypatch, capsys):
    config = copy.deepcopy(settings("data/tiny", "experiments/tiny")["realnet"])
    config["structure"][0]["layers"][0]["planes"] = 100
    config["dataset"]["train"]["anomaly_types"] = {"normal": 0.5, "dtd": 0.2}
    config["trainer"]["optimizer"]["type"] = "Adamant"
    config["criterion"][0]["type"] = "Loss"
    path = workspace.write_settings("many", config)
    arguments = ["--config", str(path), "--class_name"]
    code, _, err = run(train_realnet.main, [*arguments, "dots"], workspace.root, monkeypatch, capsys)
    assert code == 2
    for text in ("keeps 100 of layer1", "add up to 0.7", "Adamant", "'Loss'"):
        assert text in err
    assert all(str(path) in line for line in err.splitlines())
    code, _, err = run(train_realnet.main, [*arguments, "squares"], workspace.root, monkeypatch, capsys)
    assert code == 2
    lines = err.splitlines()
    assert lines[0].startswith("error: --class_name squares: ")
    for text in ("keeps 100 of layer1", "Adamant", "'Loss'"):
        assert text in err
    assert all(str(path) in line for line in lines[1:])
