"""benchmarks/gpu.py and benchmarks/memory.py, with small networks and without a GPU."""

from functools import partial

import pytest
import torch

from benchmarks import gpu, memory
from utils.distributed import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*data pointer of FakeTensor")
CPU = Run(0, 1, torch.device("cpu"))


@pytest.fixture
def bench():
    rates = dict.fromkeys(gpu.PRECISIONS, 1e12)
    return gpu.Bench(CPU, batch=2, quick=True, seconds=0.0, rates=rates)


@pytest.mark.parametrize("work", [*gpu.TRAININGS, "sampling", "prediction"])
def test_every_step_is_measured(work, bench):
    line, right = gpu.measure(bench, gpu.Variant(work, "off", channels_last=work == "detector"))
    assert right
    name, off, *_, rate, peak, share, verdict = (cell.strip() for cell in line.strip("|").split("|"))
    assert name.startswith(f"{work}: off")
    assert float(rate) > 0
    assert float(peak) > 0
    assert verdict == ""
    if work in gpu.TRAININGS:
        assert float(off) < 1e-3
        assert share.endswith("%")


def test_a_wrong_loss_is_noticed(bench):
    bench.losses["classifier"] = 10 * bench.loss_on_cpu("classifier")
    line, right = gpu.measure(bench, gpu.Variant("classifier", "off"))
    assert not right
    assert "WRONG" in line


def test_slow_configurations_come_last():
    order = [variant.compiled for variant in gpu.variants((False, True))]
    assert order == sorted(order)
    assert len(set(gpu.variants((False, True)))) == len(order) == 40


@pytest.mark.parametrize("script", gpu.TRAININGS)
def test_the_estimate_covers_the_training_state_and_grows_with_the_batch(script, bench):
    subject = bench.subject(script)
    one, four, many = memory.peaks_of(partial(memory.training, subject), [1, 4, 16])
    trainable = sum(p.numel() for n, p in subject.build().named_parameters() if not n.startswith("backbone"))
    assert one > 4 * 4 * trainable  # weights, gradients, two moments
    assert many > four >= one
    if script != "detector":  # whose peak is the optimiser's step for so few small images
        assert four > one
    if script == "classifier":
        recomputed = bench.subject(script, "classifier.use_checkpoint=True")
        assert memory.peaks_of(partial(memory.training, recomputed), [4])[0] < four


def test_sampling_and_prediction_are_estimated(bench):
    both = [bench.subject(script) for script in ("diffusion", "classifier")]
    for begin in (partial(memory.sampling, *both, "bf16"), partial(memory.prediction, bench.subject("detector"))):
        # Of fewer images, the peak of these small networks can be that of loading them.
        few, many = memory.peaks_of(begin, [1, 4096])
        assert many > few > 0


def test_live_bytes_are_those_of_tensors_that_are_referred_to():
    with memory.FakeTensorMode(), memory.LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[:10]
        second = first + 1
        del first
        assert live.live == 8000
        del view, second
        assert (live.live, live.peak) == (0, 8000)
