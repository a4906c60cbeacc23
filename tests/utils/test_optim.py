"""Optimiser steps: which are skipped, what they keep, and which optimiser can go on from a saved one."""

import copy
import gc
import itertools
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from easydict import EasyDict
from torch import nn

from utils.config import read_yaml
from utils.errors import RunError, UsageError
from utils.meter import Meter
from utils.optim import EMA, EpochLoss, Stepper, build_optimizer, check_optimizer, learning_rate_factor

CPU = torch.device("cpu")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(fused, value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    stepper = Stepper(model, optimizer, "off", 1.0, max_bad_steps=2)

    def step(scale: float) -> None:
        stepper.backward(model(torch.randn(2, 3, 4, 4) * scale).square().mean())
        stepper.step()

    step(1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    for _ in range(2):
        step(value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(
        torch.equal(a, b)
        for a, b in zip(moments, (v for s in optimizer.state.values() for v in s.values()), strict=True)
    )
    assert int(stepper.bad_steps) == 2
    stepper.check(Path("ckpt"))
    step(1.0)
    assert int(stepper.bad_in_a_row) == 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for _ in range(3):
        step(value)
    with pytest.raises(RunError, match=r"not finite in 3 steps in a row .*no state was saved"):
        stepper.check(Path("ckpt"))


@pytest.mark.parametrize(
    ("before", "after", "missing"),
    [
        ("{type: Adam, kwargs: {lr: 1e-3}}", "{type: Adam, kwargs: {lr: 1e-3, amsgrad: True}}", "max_exp_avg_sq"),
        ("{type: SGD, kwargs: {lr: 1e-3, momentum: 0.9}}", "{type: Adam, kwargs: {lr: 1e-3}}", "exp_avg, exp_avg_sq"),
        ("{type: RMSprop, kwargs: {lr: 1e-3}}", "{type: RMSprop, kwargs: {lr: 1e-3, centered: True}}", "grad_avg"),
        ("{type: Adam, kwargs: {lr: 1e-3}}", "{type: AdamW, kwargs: {lr: 1e-3}}", None),
    ],
)
def test_an_optimiser_that_cannot_go_on_is_named(before, after, missing):
    networks = [torch.nn.Linear(2, 2) for _ in range(2)]
    steppers = [
        Stepper(net, build_optimizer(EasyDict(read_yaml(text)), net, torch.device("cpu")), "off", None)
        for net, text in zip(networks, (before, after), strict=True)
    ]
    steppers[0].backward(networks[0](torch.ones(1, 2)).sum())
    steppers[0].step()
    state = steppers[0].state_dict()
    if missing is None:
        steppers[1].load_state_dict(state)
    else:
        with pytest.raises(ValueError, match=f"keeps {missing}.*start anew with --overwrite"):
            steppers[1].load_state_dict(state)


def memory_in_use() -> dict[str, int]:
    """What is alive now: tensors, bytes of Python objects, and resident bytes of the process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "python": tracemalloc.get_traced_memory()[0],
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
    }


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_steps():
    """The parts of the training loop: steps, averages and running means."""
    model = nn.Linear(64, 64)
    stepper = Stepper(model, torch.optim.Adam(model.parameters()), "off", 1.0)
    meter, epoch_loss, ema = Meter(), EpochLoss(torch.device("cpu")), EMA(model, 0.99)
    tracemalloc.start()
    try:
        for step in range(1500):
            loss = model(torch.ones(64, 64)).square().mean()
            stepper.backward(loss)
            stepper.step()
            ema.update(model, step)
            meter.add({"loss": loss.detach()}, 8)
            meter.finish_step()
            epoch_loss.add(loss.detach(), 1.0)
            if step % 20 == 0:
                meter.read()
            if step in (250, 500):  # the first measurement needs memory of its own
                before = memory_in_use()
        growth = {name: value - before[name] for name, value in memory_in_use().items()}
    finally:
        tracemalloc.stop()
    # Of 1000 steps: a tensor, 20 bytes of Python objects or 2 kB of others kept in each would show.
    assert growth["tensors"] <= 20, growth
    assert growth["python"] < 20_000, growth
    assert growth["resident"] < 2_000_000, growth


NONSENSE = [
    ("{type: Adam, kwargs: {lr: 0}}", "trainer.optimizer.kwargs.lr: 0 has to be above 0"),
    ("{type: Adam, kwargs: {lr: fast}}", "trainer.optimizer.kwargs.lr: 'fast' is not a finite number"),
    ("{type: Adam, kwargs: {lr: True}}", "trainer.optimizer.kwargs.lr: True"),
    ("{type: Adam, kwargs: {lr: .inf}}", "trainer.optimizer.kwargs.lr: inf"),
    ("{type: Adam, kwargs: {eps: .inf}}", "trainer.optimizer.kwargs.eps: inf"),
    ("{type: Adam, kwargs: {betas: [0.9, 0.99, 0.999]}}", "trainer.optimizer.kwargs.betas: [0.9, 0.99, 0.999] is not"),
    ("{type: Adam, kwargs: {betas: [0.9, 1.0]}}", "trainer.optimizer.kwargs.betas: 1.0 has to be below 1"),
    ("{type: Adam, kwargs: {amsgrad: 'False'}}", "trainer.optimizer.kwargs.amsgrad: 'False' is not True or False"),
    ("{type: Adam, kwargs: {weight_decay: -1}}", "trainer.optimizer.kwargs.weight_decay: -1"),
    ("{type: Adam, kwargs: {learning_rate: 1}}", "trainer.optimizer.kwargs.learning_rate is not an argument"),
    ("{type: SGD, kwargs: {lr: 1e-3, momentum: 1}}", "trainer.optimizer.kwargs.momentum: 1"),
    ("{type: SGD, kwargs: {lr: 1e-3, nesterov: True}}", "trainer.optimizer.kwargs: Nesterov"),
    ("{type: LBFGS, kwargs: {lr: 1}}", "trainer.optimizer.type: LBFGS with these kwargs cannot make a step"),
    ("{type: SparseAdam, kwargs: {lr: 1e-3}}", "trainer.optimizer.type: SparseAdam"),
    ("{type: Optimizer, kwargs: {lr: 1e-3}}", "trainer.optimizer.type: torch.optim has no 'Optimizer'"),
    ("{type: lr_scheduler, kwargs: {lr: 1e-3}}", "trainer.optimizer.type: torch.optim has no"),
]


@pytest.mark.parametrize(("section", "says"), NONSENSE, ids=[section for section, _ in NONSENSE])
def test_an_optimiser_that_cannot_train_is_refused_by_its_key(section, says):
    with pytest.raises(UsageError) as error:
        check_optimizer(EasyDict(read_yaml(section)))
    assert says in str(error.value)


@pytest.mark.parametrize(
    "section",
    [
        "{type: Adam, kwargs: {lr: 1e-4, weight_decay: 0, betas: [0.9, 0.999]}}",
        "{type: SGD, kwargs: {lr: 0.1, momentum: 0.9, nesterov: True}}",
        "{type: AdamW, kwargs: {lr: 1e-3, foreach: False}}",
        "{type: RMSprop, kwargs: {lr: 1e-3}}",
    ],
)
def test_common_optimisers_pass(section):
    check_optimizer(EasyDict(read_yaml(section)))


def trained_stepper(fused: bool) -> Stepper:
    model = nn.Linear(2, 2)
    stepper = Stepper(model, torch.optim.Adam(model.parameters(), lr=0.1, fused=fused), "off", None)
    stepper.backward(model(torch.ones(1, 2)).sum())
    stepper.step()
    return stepper


def test_a_saved_state_goes_on_in_a_fused_optimiser():
    saved, fused = trained_stepper(False), trained_stepper(True)
    fused.load_state_dict(saved.state_dict())
    assert fused.optimizer.param_groups[0]["fused"] is True
    fused.backward(fused.model(torch.ones(1, 2)).sum())
    fused.step()
    assert all(int(state["step"]) == 2 for state in fused.optimizer.state.values())


@pytest.mark.parametrize(
    ("kind", "kwargs", "fused"),
    [
        ("Adam", {}, True),
        ("AdamW", {}, True),
        ("Adam", {"fused": False}, False),
        ("Adam", {"foreach": True}, None),
        # A skipped first step would leave its momentum uninitialised.
        ("SGD", {"momentum": 0.9}, None),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_the_step_is_fused_where_possible_whatever_the_checkpoint_says(kind, kwargs, fused, saved):
    def stepper(**more: object) -> Stepper:
        model = nn.Linear(2, 2)
        section = EasyDict(type=kind, kwargs={"lr": 0.1, **more})
        made = Stepper(model, build_optimizer(section, model, torch.device("cpu")), "off", None)
        made.backward(model(torch.ones(1, 2)).sum())
        made.step()
        return made

    resumed = stepper(**kwargs)
    resumed.load_state_dict(stepper(fused=saved).state_dict())
    assert resumed.optimizer.param_groups[0]["fused"] is fused
    resumed.backward(resumed.model(torch.ones(1, 2)).sum())
    resumed.step()
    assert int(resumed.bad_steps) == 0


@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_moments_of_another_memory_layout_stay_with_their_weights(layouts):
    def after_a_step(layout: str) -> Stepper:
        torch.manual_seed(0)
        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        model = nn.Conv2d(3, 4, 3).to(memory_format=formats[layout])
        made = Stepper(model, build_optimizer(EasyDict(type="Adam", kwargs={"lr": 0.1}), model, CPU), "off", None)
        steps(made, 1)
        return made

    def steps(stepper: Stepper, count: int) -> torch.Tensor:
        for _ in range(count):
            images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
            stepper.backward(stepper.model(images).square().sum())
            stepper.step()
        return stepper.model.weight

    first, second = (after_a_step(layout) for layout in layouts)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(steps(second, 3), steps(first, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state[0].update(exp_avg=torch.zeros(3, 3)), "has the shape"),
        (lambda state: state[0].update(exp_avg=torch.zeros(2, 2).to_sparse()), "is sparse"),
        (lambda state: state[0].update(exp_avg=torch.zeros(2, 2, dtype=torch.complex64)), "complex64"),
        (lambda state: state[0].update(exp_avg=torch.zeros(2, 2, device="meta")), "meta"),
        (lambda state: state[0].update(exp_avg="much"), "exp_avg of parameter 0 is 'much'"),
        (lambda state: state[0].update(exp_avg=torch.zeros(())), r"has the shape \[\], not \[2, 2\]"),
        (lambda state: state[0].update(exp_avg=0.5), "exp_avg of parameter 0 is 0.5, not a tensor"),
        (lambda state: state[0].update(exp_avg=None), "exp_avg of parameter 0 is None, not a tensor"),
        (lambda state: state[0].update(exp_avg_sq=torch.full((2, 2), torch.inf)), "not finite"),
        (lambda state: state[0].update(exp_avg=torch.zeros(2, 2).to(torch.float8_e4m3fn)), "too coarse"),
        (lambda state: state[0].update(step=torch.tensor(-1.0)), "step of parameter 0 counts below 0"),
        (lambda state: state[0].update(step=True), "step of parameter 0 is True"),
        (lambda state: state.update({7: state[0]}), "no parameter 7"),
    ],
)
def test_a_state_of_another_shape_or_kind_is_refused(change, says):
    stepper = trained_stepper(False)
    state = stepper.state_dict()
    change(state["optimizer"]["state"])
    with pytest.raises(ValueError, match=says):
        stepper.load_state_dict(state)


def test_an_optimiser_before_its_first_step_lacks_its_state():
    fresh = nn.Linear(2, 2)
    assert not trained_stepper(False).lacks_state
    assert Stepper(fresh, torch.optim.Adam(fresh.parameters()), "off", None).lacks_state
    assert not Stepper(fresh, torch.optim.SGD(fresh.parameters(), lr=1.0), "off", None).lacks_state


def test_a_schedule_multiplies_the_learning_rate_of_the_settings():
    weight = nn.Parameter(torch.zeros(1))
    model = nn.Module()
    model.weight = weight
    stepper = Stepper(model, torch.optim.SGD([weight], lr=2.0), "off", None)
    for factor in (0.5, 1.0, 0.25):
        stepper.backward(weight.sum())
        stepper.step(factor)
    assert weight.item() == pytest.approx(-2 * 1.75)
    # A resumed run begins with the learning rate of its settings, not with the scheduled one.
    again = Stepper(model, torch.optim.SGD([weight], lr=3.0), "off", None)
    again.load_state_dict(stepper.state_dict())
    again.backward(weight.sum())
    again.step(0.5)
    assert weight.item() == pytest.approx(-2 * 1.75 - 1.5)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 30])
def test_a_schedule_rises_and_then_stays_or_falls(kind, warmup):
    factors = [learning_rate_factor({"type": kind, "warmup_steps": warmup}, step, 20) for step in range(20)]
    rising, rest = factors[:warmup], factors[warmup:]
    assert rising == pytest.approx([(step + 1) / warmup for step in range(len(rising))])
    if kind == "constant":
        assert rest == [1.0] * len(rest)
    elif rest:
        assert rest[0] == 1.0
        assert all(a > b > 0 for a, b in itertools.pairwise(rest))
        # Half-way between the end of the warm-up and the end of the training.
        assert learning_rate_factor({"type": kind, "warmup_steps": warmup}, (20 + warmup) // 2, 20) <= 0.6


def test_averaged_weights_leave_frozen_ones_alone():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].requires_grad_(False)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model[1].weight.add_(1.0)
    before = [p.clone() for p in ema.model.parameters()]
    ema.update(model, step=0)
    after = list(ema.model.parameters())
    assert torch.equal(after[0], before[0])
    assert after[1].item() == pytest.approx(before[1].item() + 0.9)  # the decay of the first step is 1 / 10


def test_what_an_optimiser_does_not_use_of_a_saved_state_is_told(caplog):
    saved, model = trained_stepper(False), nn.Linear(2, 2)
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), "off", None)
    with caplog.at_level("INFO", logger="realnet"):
        stepper.load_state_dict(saved.state_dict())
    assert "SGD does not use the saved exp_avg, exp_avg_sq, step" in caplog.text


def test_an_epoch_whose_steps_were_all_skipped_ends_the_run():
    model = nn.Linear(1, 1)
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), "off", None)
    stepper.check_epoch(2)
    for _ in range(2):
        stepper.backward(model(torch.ones(1, 1)).sum() * float("nan"))
        stepper.step()
    stepper.check_epoch(3)  # one step before them was made
    with pytest.raises(RunError, match="not finite in any of the 2 steps of the epoch"):
        stepper.check_epoch(2)
