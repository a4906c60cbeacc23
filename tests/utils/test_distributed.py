"""Two gloo ranks do what one process does."""

import copy
import os
import time
import urllib.error
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import build_realnet
from models.afs import channel_losses
from models.backbones import TIMM_FILES, find_weights
from tests.conftest import REALNET, two_ranks
from tests.rule_filled import randn
from utils import distributed
from utils.distributed import Run
from utils.errors import RunError, UsageError
from utils.optim import EMA, Stepper, accumulation_groups


def batchnorm_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=0.9, affine=False)
    )


def _batchnorm_in_rank(run: Run) -> None:
    x = randn(0, 6, 3, 8, 8)
    alone = batchnorm_network()
    (alone(x) ** 3).mean().backward()
    network = distributed.parallel(distributed.synchronize_batchnorm(batchnorm_network(), run), run)
    (network(x[run.rank * 3 : run.rank * 3 + 3]) ** 3).mean().backward()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(network.module.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for expected, parameter in zip(alone.parameters(), network.module.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-5)


def test_synchronised_batchnorm_equals_one_process_with_the_whole_batch():
    two_ranks(_batchnorm_in_rank)


def _far_from_zero_in_rank(run: Run) -> None:
    torch.manual_seed(0)
    x = 1000 + torch.randn(8, 2, 16, 16, dtype=torch.float64) * torch.tensor([1.0, 3.0])[:, None, None]
    x[4:, 1] += 20  # the ranks' means differ
    # Unequal parts: the ranks' means weigh by their images.
    own = x[:6] if run.rank == 0 else x[6:]
    layer = distributed.synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(2, momentum=1.0, affine=False)), run)
    layer(own.float())
    torch.testing.assert_close(layer[0].running_var.double(), x.transpose(0, 1).flatten(1).var(1), rtol=1e-3, atol=0)
    torch.testing.assert_close(layer[0].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-6, atol=0)
    out = layer(own.float())
    expected = nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(out.double(), expected[:6] if run.rank == 0 else expected[6:], rtol=0, atol=1e-3)


def test_synchronised_batchnorm_is_right_for_values_far_from_zero():
    two_ranks(_far_from_zero_in_rank)


def _without_warnings_in_rank(run: Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = distributed.parallel(distributed.synchronize_batchnorm(batchnorm_network(), run), run)
        network(randn(run.rank, 2, 3, 8, 8)).sum().backward()
        # Buffers stay as each rank has them; synchronised BatchNorm keeps them equal.
        network.module.register_buffer("own", torch.tensor(float(run.rank)))
        network(randn(run.rank, 2, 3, 8, 8))
        assert network.module.own.item() == run.rank
        distributed.barrier()


def test_nothing_deprecated_is_used():
    two_ranks(_without_warnings_in_rank)


def _on_main_in_rank(run: Run) -> None:
    called = []
    assert distributed.on_main(lambda: called.append(run.rank) or "answer") == "answer"
    assert called == [0] * (run.rank == 0)

    def fail() -> None:
        raise UsageError(f"rank {run.rank} says no")

    with pytest.raises(UsageError, match="rank 0 says no"):
        distributed.on_main(fail)


def test_what_rank_0_does_all_ranks_return_or_raise():
    two_ranks(_on_main_in_rank)


def _weights_in_rank(run: Run, folder: Path) -> None:
    """Only one rank's folder holds the file; the answer of rank 0 counts, and no rank waits for ever."""
    downloads = []

    def refuse(url: str, *args: object, **kwargs: object) -> None:
        downloads.append(url)
        raise urllib.error.URLError("no network")

    torch.hub.download_url_to_file = refuse
    for owner in (0, 1):
        own = folder / f"owner{owner}_rank{run.rank}"
        (own / "pretrain").mkdir(parents=True)
        os.chdir(own)
        path = Path("pretrain") / TIMM_FILES["resnet18"]
        if owner == run.rank:
            path.touch()
        if owner == 0:
            assert find_weights("resnet18") == path
            assert downloads == []
        else:
            with pytest.raises(RunError, match=r"is missing and cannot be downloaded \(no network"):
                find_weights("resnet18")
            assert len(downloads) == (run.rank == 0)


def test_rank_0_finds_the_weights_for_all(tmp_path):
    two_ranks(_weights_in_rank, tmp_path)


def test_downloaded_weights_are_read_as_weights_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **options: asked.append(options) or {}
    )
    assert find_weights("resnet18").parent == Path("pretrain")
    assert asked[0]["weights_only"] is True
    assert asked[0]["check_hash"] is True


def _waiting_in_rank(run: Run) -> None:
    group = torch.distributed.group.WORLD._get_backend(run.device)
    assert group.options._timeout == distributed.TIMEOUT >= timedelta(hours=12)
    time.sleep(run.rank)
    distributed.barrier()


def test_a_rank_may_keep_the_others_waiting():
    two_ranks(_waiting_in_rank)


def _collectives_in_rank(run: Run) -> None:
    assert (run.world_size, run.is_main) == (2, run.rank == 0)
    assert distributed.broadcast(f"from {run.rank}") == "from 0"
    gathered = distributed.gather(np.full(2, run.rank))
    assert (gathered is None) == (run.rank == 1)
    if gathered is not None:
        assert [part.tolist() for part in gathered] == [[0, 0], [1, 1]]
    assert distributed.all_reduce_mean(torch.tensor([float(run.rank)])).item() == 0.5
    assert distributed.all_reduce_sum(torch.tensor([float(run.rank)])).item() == 1.0


def test_collectives():
    two_ranks(_collectives_in_rank)


def _afs_in_rank(run: Run) -> None:
    torch.manual_seed(0)
    block = {"name": "b", "layers": [{"idx": "layer1", "planes": 32}], "stride": 4}
    net = copy.deepcopy(REALNET["net"])
    net[2]["kwargs"]["hide_channels_ratio"] = 1.0
    network = build_realnet({"net": net, "structure": [block]})
    batches = [
        {"image": randn(k, 2, 3, 64, 64), "gt_image": randn(9 + k, 2, 3, 64, 64), "mask": torch.ones(2, 1, 64, 64)}
        for k in range(2)
    ]
    images, gt_images = batches[run.rank]["image"], batches[run.rank]["gt_image"]
    extract = network.backbone.feature_extractor
    difference = extract(images)["layer1"] - extract(gt_images)["layer1"]
    own = channel_losses(difference, batches[run.rank]["mask"], (16, 16))
    losses = network.afs.init_indexes(network.backbone, [batches[run.rank]], 1)["b_layer1"]
    torch.testing.assert_close(losses, distributed.all_reduce_mean(own.detach().clone()))
    kept = distributed.gather(network.afs.indexes.b_layer1.tolist())
    if kept is not None:
        assert kept[0] == kept[1]
        assert kept[0] == losses.argsort()[:32].sort().values.tolist()


def test_afs_keeps_the_same_channels_on_every_rank():
    two_ranks(_afs_in_rank)


def _accumulation_in_rank(run: Run) -> None:
    """Accumulated micro-batches over two ranks give the gradient of the whole batch."""
    torch.manual_seed(0)
    network = nn.Linear(5, 1)
    x = randn(0, 12, 5)
    network(x).square().mean().backward()
    expected = network.weight.grad.clone()
    network.zero_grad()
    model = distributed.parallel(network, run)
    own_batches = x[run.rank * 6 : run.rank * 6 + 6].chunk(3)
    for micro, part in enumerate(own_batches):
        with distributed.no_sync(model, micro < 2):
            (model(part).square().mean() / 3).backward()
        if micro < 2:
            others = distributed.gather(network.weight.grad.clone())
            assert others is None or not torch.equal(*others)
    torch.testing.assert_close(network.weight.grad, expected)


def test_gradients_are_exchanged_with_the_last_micro_batch():
    two_ranks(_accumulation_in_rank)


# ---- one process -----------------------------------------------------------------------------------------------------


def test_accumulation_groups_cover_the_epoch():
    assert accumulation_groups(7, 3) == [3, 3, 1]
    assert accumulation_groups(6, 3) == [3, 3]
    assert accumulation_groups(2, 5) == [2]


def test_a_step_clips_the_accumulated_gradient_once():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    stepper = Stepper(network, torch.optim.SGD(network.parameters(), lr=1.0), "off", clip_max_norm=1.0)
    for _ in range(3):
        stepper.backward(5 * network.weight.sum() / 3)
    stepper.step()
    # A norm of 5 is clipped to 1; clipping each third to 1 would have given 3.
    torch.testing.assert_close(network.weight.item(), -1.0, rtol=1e-4, atol=0)
    assert network.weight.grad is None


def test_ema_warms_up():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = EMA(network, 0.9999)
    nn.init.ones_(network.weight)
    expected = 0.0
    for k in range(50):
        ema.update(network, k)
        decay = min(0.9999, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay)
    # Without warm-up it would be 0.005.
    torch.testing.assert_close(ema.model.weight.item(), expected)
    assert ema.model.weight.item() > 0.99


def test_lost_connections_are_recognised():
    assert distributed.is_lost_connection(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:3"))
    assert not distributed.is_lost_connection(RuntimeError("shapes cannot be multiplied"))
