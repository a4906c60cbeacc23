"""What a training reports of itself."""

import json
import time

import pytest
import torch
import yaml

from utils import meter as meter_module
from utils.meter import Forecast, Meter


def test_a_mean_covers_exactly_the_steps_since_the_last_reading():
    meter = Meter()
    for epoch in range(2):  # also across epochs
        for value in (1.0, 2.0):
            meter.add({"loss": torch.tensor(value + epoch)}, 4)
            meter.finish_step()
        if epoch == 0:
            meter.add({"loss": 6.0}, 4)
            meter.finish_step()
            assert meter.read().means == {"loss": 3.0}
    assert meter.read().means == {"loss": 2.5}


def test_waiting_for_data_is_measured_and_pauses_are_left_out():
    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield i

    meter = Meter()
    for _ in meter.waiting_for(slow()):
        meter.add({}, 10)
        meter.finish_step()
    with meter.paused():
        time.sleep(0.5)
    reading = meter.read()
    assert reading.data_share > 0.8
    assert 0.04 < reading.step_seconds < 0.12
    assert reading.images_per_second == pytest.approx(10 / reading.step_seconds)


def test_a_run_writes_down_what_it_is(workspace):
    arguments = ["--class_name", "lines", "--set", "trainer.print_freq_step=2"]
    names = ("checkpoints", "log", "vis")
    arguments += [part for name in names for part in ("--set", f"saver.{name}_dir=recorded/{name}/")]
    done = workspace.run("train_realnet.py", *arguments)
    folder = workspace.out / "recorded/log/lines"
    first = done.stdout.splitlines()
    assert "train_realnet.py --dataset tiny --class_name lines" in first[0]
    assert f"torch {torch.__version__} on cpu x 1" in first[1]
    settings = yaml.safe_load((folder / "train_realnet.settings.yaml").read_text())
    assert settings["trainer"]["max_bad_steps"] == 20
    assert settings["trainer"]["print_freq_step"] == 2
    record = json.loads((folder / "train_realnet.runs.jsonl").read_text())
    assert {"command", "commit", "python", "torch", "torchvision", "numpy", "device", "ranks", "started"} <= set(record)
    steps = [line for line in first if line.startswith("epoch") and "  step " in line]
    assert steps[0].startswith("epoch 1/2  step 2/4  loss ")
    for part in ("images/s", "data ", "eta 0:00:0"):
        assert part in steps[0]
    lines = [json.loads(line) for line in (folder / "train_realnet.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "validation" not in line]
    assert [line["step"] for line in steps] == [2, 4]
    assert steps[-1]["eta_seconds"] == 0
    assert {"loss", "images_per_second", "data_share", "learning_rate", "peak_memory_GiB"} <= set(steps[0])
    validations = [line for line in lines if "validation" in line]
    assert [(line["epoch"], line["step"]) for line in validations] == [(1, 2), (2, 4)]
    assert all(0 <= line["validation"]["image_auroc"] <= 1 for line in validations)


LEFT = [
    (280, "280 steps are left, about 0:09:20", False),
    (10**5, "100000 steps are left", True),
    (1, "1 step is left, about 0:00:02", False),
]


@pytest.mark.parametrize(("left", "says", "day"), LEFT)
def test_the_time_that_is_left_is_told_once_and_a_day_is_a_warning(left, says, day, monkeypatch, caplog):
    now, waits = [0.0], []
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    forecast = Forecast()
    with caplog.at_level("INFO", logger="realnet"):
        for _ in range(60):
            now[0] += 2.0
            forecast.finish_step(left, lambda: waits.append(now[0]))
    assert waits == [10.0, 40.0]
    assert sum("left, about" in record.message for record in caplog.records) == 1
    assert says in caplog.text
    assert "(2 s a step)" in caplog.text
    assert ("more than a day" in caplog.text) == day
