"""How reconstruction begins, and the anomaly map of residuals."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from models.afs import AFS, Block
from models.backbones import Backbone
from models.recon import ReconstructionLayer, SimpleReconstructionLayer
from models.scoring import OFFSET, AnomalyScore
from models.subspace import Moments, NormalSubspace
from tests.conftest import two_ranks
from utils import distributed
from utils.distributed import Run
from utils.errors import UsageError

LAYERS = {
    "unet": lambda planes, **kwargs: ReconstructionLayer(planes, 1, 0.5, (1, 2), (), **kwargs),
    "simple": SimpleReconstructionLayer,
}


def correlated(count: int, channels: int, seed: int = 0) -> torch.Tensor:
    """(count, channels) values far from 0, of very different variances."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, channels)) * np.logspace(1, -2, channels)
    return torch.from_numpy(rng.normal(size=(count, channels)) @ mixing.T + 50).float()


# ---- the normal subspace ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_the_projection_is_that_of_principal_components(share):
    values = correlated(400, 6)
    moments = Moments()
    for part in values.split(100):
        moments.add("b", part.T.reshape(1, 6, 10, 10))
    subspace = NormalSubspace(6, share)
    count = subspace.fit(*moments.result("b"))
    pca = PCA().fit(values.double().numpy())
    kept = int((np.cumsum(pca.explained_variance_ratio_) < share - 1e-9).sum()) + 1
    assert count == kept
    pca = PCA(kept).fit(values.double().numpy())
    expected = pca.inverse_transform(pca.transform(values.double().numpy()))
    projected = subspace(values.T.reshape(1, 6, 20, 20)).reshape(6, 400).T
    assert np.allclose(projected.numpy(), expected, atol=1e-2)


def moments_in_a_rank(run: Run) -> None:
    values = correlated(300, 4)
    moments, own = Moments(), values[:100] if run.is_main else values[100:]
    moments.add("b", own.T.reshape(1, 4, len(own) // 10, 10))
    mean, covariance = moments.result("b")
    assert torch.allclose(mean, values.double().mean(dim=0), rtol=1e-6)
    assert torch.allclose(covariance, torch.cov(values.double().T, correction=0), rtol=1e-4, atol=1e-4)


def test_the_moments_are_those_of_all_ranks():
    two_ranks(moments_in_a_rank)


@pytest.mark.parametrize("standardize", [False, True])
def test_the_moments_are_those_of_the_features_that_are_kept(standardize):
    torch.manual_seed(0)
    backbone = Backbone("squeezenet1_1", ["features.4", "features.7"], weights="random", standardize=standardize)
    afs = AFS([Block("b", (("features.4", 8), ("features.7", 8)), 8)], backbone.channels)
    images = torch.rand(3, 3, 48, 64)
    mask = torch.zeros(3, 1, 48, 64)
    mask[..., 10:30, 10:30] = 1
    batch = {"image": images + mask, "gt_image": images, "mask": mask}
    moments = Moments()
    afs.init_indexes(backbone, [batch], 1, moments)
    mean, covariance = afs.kept_moments(moments, backbone)["b"]
    features = afs(backbone(images), (48, 64))["b"].double().transpose(0, 1).flatten(1)
    assert torch.allclose(mean, features.mean(dim=1), atol=1e-3)
    assert torch.allclose(covariance, torch.cov(features, correction=0), rtol=1e-2, atol=1e-3 * features.var())


# ---- how reconstruction begins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_reconstruction_begins_as_the_features_or_their_projection(layer):
    features = {"block": torch.rand(2, 64, 9, 12)}
    assert torch.equal(LAYERS[layer]({"block": 64}, start="identity")(features)["block"], features["block"])
    projecting = LAYERS[layer]({"block": 64}, start="subspace")
    projecting.subspace("block").fit(torch.rand(64), torch.cov(torch.rand(64, 200)))
    expected = projecting.subspace("block")(features["block"])
    assert torch.allclose(projecting(features)["block"], expected, atol=1e-5)
    assert not torch.allclose(expected, features["block"], atol=1e-2)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_reference_s_start_has_the_reference_s_tensors(layer):
    names = {start: set(LAYERS[layer]({"block": 64}, start=start).state_dict()) for start in ("zero", "identity")}
    assert names["zero"] == names["identity"] == set(LAYERS[layer]({"block": 64}).state_dict())
    more = set(LAYERS[layer]({"block": 64}, start="subspace").state_dict()) - names["zero"]
    assert more == {"block_subspace.weight", "block_subspace.bias"}


def test_an_unknown_start_is_refused():
    with pytest.raises(UsageError, match="start: 'noise' is not one of zero, identity, subspace"):
        ReconstructionLayer({"block": 64}, start="noise")


# ---- the anomaly map -------------------------------------------------------------------------------------------------


SCALES = torch.tensor([1.0, 100.0, 0.1])[:, None, None]


def outputs(count: int, seed: int, scale: float = 1.0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "residual": {
                "fine": torch.rand(2, 3, 8, 8, generator=generator) * SCALES * scale,
                "coarse": torch.rand(2, 2, 4, 4, generator=generator) * scale,
            },
            "block_feats": {
                "fine": torch.randn(2, 3, 8, 8, generator=generator) * SCALES * scale**0.5 + 5,
                "coarse": torch.randn(2, 2, 4, 4, generator=generator) * scale**0.5,
            },
            "logit": torch.randn(2, 2, 16, 16, generator=generator) * 3 + torch.tensor([2.0, -2.0])[:, None, None],
        }
        for _ in range(count)
    ]


def test_the_discriminator_s_map_is_the_softmax():
    logit = torch.randn(2, 2, 5, 7)
    assert torch.equal(AnomalyScore({})({"logit": logit}), logit.softmax(dim=1)[:, 1:])
    assert AnomalyScore({"fine": 3}).state_dict() == {}


@pytest.mark.parametrize("kind", ["residual", "both", "residual+novelty"])
def test_normal_images_have_a_standardised_map(kind):
    score = AnomalyScore({"fine": 3, "coarse": 2}, kind)
    score.measure(lambda: outputs(40, seed=0))
    maps = torch.cat([score(output) for output in outputs(40, seed=1)])
    deviations = maps.logit() + OFFSET
    assert maps.shape == (80, 1, 16, 16)
    assert deviations.mean().item() == pytest.approx(0, abs=0.05)
    assert deviations.std().item() == pytest.approx(1, rel=0.05)
    # Ten times the residual of normal images is anomalous, whatever a channel's scale.
    worse = torch.cat([score(output) for output in outputs(4, seed=2, scale=10)])
    assert worse.mean() > maps.mean() + 0.3


@pytest.mark.parametrize("kind", ["residual", "both", "residual+novelty"])
def test_a_border_that_is_always_different_is_normal(kind):
    def with_border(count: int, seed: int) -> list[dict]:
        batches = outputs(count, seed)
        for batch in batches:
            batch["residual"]["fine"][..., -2:] *= 20
            batch["logit"][:, 1, :, -4:] += 10
        return batches

    score = AnomalyScore({"fine": 3, "coarse": 2}, kind)
    score.measure(lambda: with_border(40, seed=0))
    maps = torch.cat([score(output) for output in with_border(40, seed=1)])
    deviations = (maps.logit() + OFFSET).mean(dim=(0, 1))
    assert deviations[:, -3:].mean() < 0.7
    assert deviations[:, :8].mean().abs() < 0.3


def test_a_channel_that_is_never_different_does_not_drown_the_others():
    score = AnomalyScore({"fine": 2}, "residual")
    normal = {
        "residual": {"fine": torch.stack([torch.zeros(8, 8), torch.rand(8, 8)])[None]},
        "logit": torch.zeros(1, 2, 8, 8),
    }
    score.measure(lambda: [normal])
    spark = torch.zeros(1, 2, 8, 8)
    spark[0, 0, 3, 3] = 1e-6
    sparked = {**normal, "residual": {"fine": normal["residual"]["fine"] + spark}}
    assert (score(sparked) - score(normal)).abs().max() < 1e-3


def test_novelty_is_seen_where_the_residual_is_that_of_normal_images():
    score = AnomalyScore({"fine": 3, "coarse": 2}, "residual+novelty")
    flat = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1e-4]])  # normal features lie near a plane
    score.novelty.subspace("fine").fit(torch.tensor([0.0, 0.0, 5.0]), flat)
    score.novelty.subspace("coarse").fit(torch.zeros(2), torch.eye(2)[:1].T @ torch.eye(2)[:1])

    def near_the_plane(count: int, seed: int) -> list[dict]:
        batches = outputs(count, seed)
        for batch in batches:
            batch["block_feats"]["fine"][:, 2] = (
                5 + torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed)) / 100
            )
        return batches

    score.measure(lambda: near_the_plane(40, 0))
    normal = near_the_plane(1, 1)[0]
    novel = {**normal, "block_feats": {name: values.clone() for name, values in normal["block_feats"].items()}}
    novel["block_feats"]["fine"][:, 2, 2:4, 2:4] += 1
    before, after = score(normal), score(novel)
    assert (after - before)[..., 5:7, 5:7].min() > 0.4
    # Along the plane, features differ as much as they like.
    novel["block_feats"]["fine"] = normal["block_feats"]["fine"] + torch.tensor([1.0, 1.0, 0.0])[:, None, None]
    assert torch.allclose(score(novel), before, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("residual", {"statistics.residual"}),
        ("both", {f"statistics.{name}" for name in ("residual", "log_odds", "log_odds_positions", "total")}),
    ],
)
def test_the_tensors_of_earlier_checkpoints_keep_their_names(kind, more):
    names = set(AnomalyScore({"fine": 3}, kind).state_dict())
    assert names == {"statistics.fine_mean", "statistics.fine_positions"} | more


def measured_in_a_rank(run: Run) -> None:
    score, alone = (AnomalyScore({"fine": 3, "coarse": 2}, "both") for _ in range(2))
    batches = outputs(5, seed=0)
    score.measure(lambda: batches if run.is_main else [])
    sums = [value.clone() for value in score.state_dict().values()]
    for value in sums:
        assert torch.allclose(distributed.all_reduce_mean(value.clone()), value)
    if run.is_main:
        world, distributed._world_size = distributed._world_size, lambda: 1
        alone.measure(lambda: batches)
        distributed._world_size = world
        assert all(torch.allclose(a, b) for a, b in zip(alone.state_dict().values(), sums, strict=True))


def test_statistics_are_those_of_all_ranks_even_if_one_has_no_image():
    two_ranks(measured_in_a_rank)


def test_an_unknown_score_is_refused():
    with pytest.raises(UsageError, match=r"evaluator\.score: 'mean' is not one of discriminator, residual, both"):
        AnomalyScore({}, "mean")
