"""benchmarks/speed.py with small inputs: each work runs in all its variants and gets its rows."""

import pytest

from benchmarks import speed


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(speed, "SIDE", 32)
    monkeypatch.setattr(speed, "SMALL_SIDE", 16)
    monkeypatch.setattr(speed, "SMALL_BATCH", 1)
    monkeypatch.setattr(speed, "MATMUL", 64)
    monkeypatch.setattr(speed, "native_bf16", lambda: ["bf16"])


SLOW = (speed.LARGE, "ONNX", "--help")  # these take many seconds
WORKS = dict([*speed.detector_works(), *speed.diffusion_works(), *speed.other_works()])


@pytest.mark.parametrize("name", [name for name in WORKS if not any(word in name for word in SLOW)])
def test_each_work_is_measured_in_all_its_variants(name):
    work = WORKS[name]()
    lines = list(speed.rows(work, speed.measure(work, 1)))
    assert len(lines) == len(work.variants) > 1
    for line, variant in zip(lines, work.variants, strict=True):
        assert line.startswith(f"| {name} | {variant} |")
