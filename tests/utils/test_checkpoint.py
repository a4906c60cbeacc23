import logging
import os
import pickle

import pytest
import torch
from easydict import EasyDict
from torch import nn

from utils.checkpoint import (
    load_checkpoint,
    load_pretrained,
    load_weights,
    numbered_checkpoints,
    prune_checkpoints,
    save_checkpoint,
    state_dict_of,
    trained_checkpoint,
)
from utils.errors import UsageError


class Hostile:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    for write in (lambda p, x: torch.save(x, p), lambda p, x: p.write_bytes(pickle.dumps(x))):
        path = tmp_path / "bad.pth.tar"
        write(path, {"state_dict": {}, "arch": Hostile(tmp_path / "ran")})
        with pytest.raises(UsageError, match=r"bad\.pth\.tar"):
            load_checkpoint(path)
        assert not (tmp_path / "ran").exists()


def test_the_reference_s_easydict_loads(tmp_path):
    arch = EasyDict({"net": [{"name": "afs", "kwargs": {"init_bsn": 64}}]})
    torch.save({"epoch": 3, "arch": arch, "state_dict": {"module.w": torch.ones(2)}}, tmp_path / "a.pth.tar")
    content = load_checkpoint(tmp_path / "a.pth.tar")
    assert content["arch"]["net"][0]["kwargs"]["init_bsn"] == 64
    assert list(state_dict_of(content)) == ["w"]


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_broken_files_are_named(tmp_path, content):
    (tmp_path / "a.pth.tar").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.pth\.tar"):
        load_checkpoint(tmp_path / "a.pth.tar")


def test_a_missing_openai_file_says_where_to_get_it(tmp_path):
    with pytest.raises(UsageError, match="openaipublic"):
        load_checkpoint(tmp_path / "256x256_diffusion.pt")


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))


def test_pretrained_weights_load_where_they_fit_and_are_reported(tmp_path, caplog):
    source, target = network(), network()
    state = source.state_dict()
    state["2.weight"] = torch.zeros(7, 4)
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, logger="realnet"):
        load_pretrained(target, tmp_path / "w.pt", hint="the width")
    assert "loaded 5 of 6" in caplog.text
    assert "2.weight" in caplog.text
    assert "extra" in caplog.text
    assert torch.equal(target[0].weight, source[0].weight)
    assert not torch.equal(target[2].weight, source[2].weight)


def test_too_few_fitting_tensors_are_an_error(tmp_path):
    torch.save({"state_dict": {"module.0.weight": torch.zeros(3, 2), "b": torch.zeros(1)}}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="1 of 6 tensors fit this network; check the width"):
        load_pretrained(network(), tmp_path / "w.pt", hint="the width")


def test_trained_weights_must_fit_completely():
    state = network().state_dict()
    del state["0.bias"]
    state["1.bias"] = torch.zeros(9)
    state["surplus"] = torch.zeros(1)
    with pytest.raises(UsageError, match=r"1 missing.*1 unexpected.*1 of another shape"):
        load_weights(network(), state, "x.pth.tar", "the YAML")


def test_the_highest_number_is_the_newest_and_pruning_keeps_the_newest(tmp_path):
    assert numbered_checkpoints(tmp_path) == []
    for epoch in (5, 10, 9, 100):
        save_checkpoint(tmp_path / f"ckpt_{epoch}.pth.tar", {"epoch": epoch})
    (tmp_path / "ckpt_best.pth.tar").touch()
    assert trained_checkpoint(tmp_path).name == "ckpt_100.pth.tar"
    prune_checkpoints(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["ckpt_10.pth.tar", "ckpt_100.pth.tar", "ckpt_best.pth.tar"]


def test_a_model_that_is_not_trained_yet_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.pth.tar"):
        with pytest.raises(UsageError, match="train the model first"):
            trained_checkpoint(path)


TENSORS = {
    "sparse": (lambda t: t.to_sparse(), "is sparse"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantised"),
    "meta": (lambda t: t.to("meta"), "meta"),
    "complex": (lambda t: t.to(torch.complex64), "holds complex64, not float32"),
    "int8": (lambda t: t.to(torch.int8), "holds int8, not float32"),
    "bool": (lambda t: t.bool(), "holds bool, not float32"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "holds float8_e4m3fn, which is too coarse"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_another_kind_are_refused(kind):
    change, says = TENSORS[kind]
    state = network().state_dict()
    state["0.weight"] = change(state["0.weight"])
    with pytest.raises(UsageError, match=rf"1 of another kind \(0\.weight .*{says}"):
        load_weights(network(), state, "x.pth.tar", "the YAML")


def test_a_refusal_does_not_pass_on_advice_to_switch_protection_off(tmp_path):
    torch.save({"state_dict": {}, "arch": Hostile(tmp_path / "ran")}, tmp_path / "bad.pth.tar")
    with pytest.raises(UsageError) as error:
        load_checkpoint(tmp_path / "bad.pth.tar")
    assert "it holds posix.system" in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("content", [{"state_dict": [1, 2]}, {"state_dict": {1: torch.ones(1)}}, {3: torch.ones(1)}])
def test_weights_have_names(content, tmp_path):
    torch.save(content, tmp_path / "a.pth.tar")
    with pytest.raises(UsageError, match=r"a\.pth\.tar: state_dict is not a mapping from names to tensors"):
        load_checkpoint(tmp_path / "a.pth.tar")
