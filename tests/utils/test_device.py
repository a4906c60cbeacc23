"""What is set for a GPU, and that nothing is for a CPU. torch's flags can be set without a GPU."""

import logging
import warnings

import pytest
import torch

from utils.device import to_device, use_exact_kernels, use_fast_kernels

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def flags() -> tuple[str, bool, bool]:
    # Reading them raises if torch's older and newer settings disagree; torch.compile reads the first.
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )


@pytest.fixture(autouse=True)
def restored():
    matmul, convolutions, benchmark = flags()
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = convolutions, benchmark


@pytest.mark.parametrize(("tf32", "benchmark"), [(True, True), (True, False), (False, True)])
def test_a_gpu_is_set_up_as_the_settings_say_in_one_line(tf32, benchmark, caplog):
    with caplog.at_level(logging.INFO, "realnet"), warnings.catch_warnings():
        warnings.simplefilter("error")
        use_fast_kernels(GPU, tf32, benchmark)
        assert flags() == ("high" if tf32 else "highest", tf32, benchmark)
    words = {True: "on", False: "off"}
    assert caplog.messages == [f"GPU: TensorFloat-32 {words[tf32]}, cuDNN benchmark {words[benchmark]}"]


def test_evaluation_and_prediction_are_exact():
    use_fast_kernels(GPU, True, True)
    use_exact_kernels(GPU)
    assert flags() == ("highest", False, False)


def test_nothing_is_set_or_said_on_a_cpu(caplog):
    before = flags()
    with caplog.at_level(logging.INFO, "realnet"):
        use_fast_kernels(CPU, True, True)
        use_exact_kernels(CPU)
    assert flags() == before
    assert caplog.messages == []
    tensor = torch.ones(3)
    assert to_device(tensor, CPU) is tensor
