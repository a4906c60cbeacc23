"""The anomaly map, from the discriminator's logits, the reconstruction residual and the features' novelty."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from models.afs import resize
from models.subspace import NormalSubspace
from utils import distributed
from utils.choices import BOTH, DISCRIMINATOR, RESIDUAL, RESIDUAL_AND_NOVELTY, SCORES
from utils.errors import UsageError

PARTS = {  # whose deviations from normal are added
    DISCRIMINATOR: (),
    RESIDUAL: ("residual",),
    BOTH: ("residual", "log_odds"),
    RESIDUAL_AND_NOVELTY: ("residual", "novelty"),
}
FLOOR = 0.01  # of the mean over channels: a channel that hardly ever differs would drown the others
GRID, SMOOTHED = 32, 5  # cells per side of the maps of what is normal where, and of the box that smooths them
SHARE = 0.99  # of the variance of normal features, that is not novel
IMAGE_SHARE = 0.5  # of the image's mean that is taken off
OFFSET = 4.0  # deviations above normal that give 0.5


class NormalLevels(nn.Module):
    """Compares squared differences of features with what is normal for their channel and position.

    Args:
        planes: channels of each block.

    Attributes:
        <block>_mean (C,): normal means of the channels.
        <block>_positions (32,32): normal levels at positions, smoothed.
    """

    def __init__(self, planes: dict[str, int]) -> None:
        super().__init__()
        self.planes = planes
        for block, channels in planes.items():
            self.register_buffer(f"{block}_mean", torch.ones(channels))
            self.register_buffer(f"{block}_positions", torch.ones(GRID, GRID))

    def levels(self, differences: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Mean over each block's channels (N,C,h,w), each divided by its normal mean: {block: (N,1,h,w)}."""
        means = {block: getattr(self, f"{block}_mean") for block in differences}
        return {
            block: (values.float() / means[block][:, None, None]).mean(dim=1, keepdim=True)
            for block, values in differences.items()
        }

    def log_map(self, levels: dict[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Mean over blocks of log(level / normal level at the position), less half of its mean over the image.

        Images that differ as a whole, by their exposure say, are not as anomalous as the same difference at one place.

        Returns:
            (N,1,*size)
        """
        logs = [
            torch.log(resize(level, size) / _at_positions(getattr(self, f"{block}_positions"), size) + 1e-6)
            for block, level in levels.items()
        ]
        mean = torch.stack(logs).mean(dim=0)
        return mean - IMAGE_SHARE * mean.mean(dim=(2, 3), keepdim=True)

    def set_means(self, sums: "_ChannelSums") -> None:
        """Set the channels' normal means to those of differences of good images."""
        for block, mean in sums.means().items():
            floor = max(FLOOR * float(mean.mean()), 1e-12)
            getattr(self, f"{block}_mean").copy_(mean.clamp(min=floor))

    def set_positions(self, levels: list[dict[str, torch.Tensor]]) -> None:
        """Set what is normal at positions to the means of levels of good images, over batches and ranks."""
        for block in self.planes:
            positions = _mean_at_positions([batch[block] for batch in levels])
            # A position where the levels are 0 would make every later one infinite.
            getattr(self, f"{block}_positions").copy_(positions.clamp(min=1e-6))


class Novelty(NormalLevels):
    """Compares what normal subspaces leave of features with what is normal.

    Args:
        planes: channels of each block.

    Attributes:
        <block>_subspace: see NormalSubspace; to be fitted before anything is measured.
    """

    def __init__(self, planes: dict[str, int]) -> None:
        super().__init__(planes)
        for block, channels in planes.items():
            self.add_module(f"{block}_subspace", NormalSubspace(channels, SHARE))

    def subspace(self, block: str) -> NormalSubspace:
        return getattr(self, f"{block}_subspace")

    def differences(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Squared distances of features {block: (N,C,h,w)} to the subspaces, of the same shapes."""
        return {block: (values.float() - self.subspace(block)(values)) ** 2 for block, values in features.items()}


class AnomalyScore(nn.Module):
    """Turns residuals, logits and features into a map in [0, 1].

    discriminator: the softmax of the logits (RealNet, section 3.3). residual: see NormalLevels.log_map. both: the sum
    of the residual's and the log-odds' deviations from normal. The discriminator takes thousands of steps to learn what
    the residual shows from the start, and learns only what training anomalies look like. residual+novelty: the sum of
    the residual's deviations and those of what principal components of normal features leave (as in Jackson and
    Mudholkar 1979), which knows nothing of training anomalies.

    All are compared with what is normal at their position: padding and resampling make the borders of feature maps
    differ, and parts vary more in some places than in others. 0.5 lies 4 deviations above normal.

    Args:
        planes: channels of each block.
        kind: "discriminator", "residual", "both" or "residual+novelty".

    Attributes:
        statistics: what is normal, measured by measure(); nothing for discriminator. It is a NormalLevels of the
            residual, with log_odds_positions (32,32): means at positions, smoothed; residual, log_odds, novelty, total
            (2,): mean and deviation over all pixels.
        novelty: a Novelty for residual+novelty, else None.

    Shape:
        RealNet's outputs with residual and block_feats {block: (N,C,h,w)} and logit (N,2,H,W) -> (N,1,H,W)

    Raises:
        UsageError: an unknown kind.
    """

    def __init__(self, planes: dict[str, int], kind: str = DISCRIMINATOR) -> None:
        super().__init__()
        if kind not in SCORES:
            raise UsageError(f"evaluator.score: {kind!r} is not one of {', '.join(SCORES)}")
        self.kind, self.parts = kind, PARTS[kind]
        self.statistics = NormalLevels(planes if self.parts else {})
        self.novelty = Novelty(planes) if "novelty" in self.parts else None
        if "log_odds" in self.parts:
            self.statistics.register_buffer("log_odds_positions", torch.zeros(GRID, GRID))
        for name in (*self.parts, "total") if len(self.parts) > 1 else self.parts:
            self.statistics.register_buffer(name, torch.tensor([0.0, 1.0]))

    def forward(self, outputs: dict) -> torch.Tensor:
        logit = outputs["logit"]
        if self.kind == DISCRIMINATOR:
            return logit.softmax(dim=1)[:, 1:]
        deviations = self._sum(self._maps(self._levels(outputs), logit))
        if len(self.parts) > 1:
            deviations = self._deviations("total", deviations)
        return torch.sigmoid(deviations - OFFSET)

    def _differences(self, outputs: dict) -> dict[str, dict[str, torch.Tensor]]:
        """The squared differences of each part that is made of some."""
        differences = {"residual": outputs["residual"]}
        if self.novelty is not None:
            differences["novelty"] = self.novelty.differences(outputs["block_feats"])
        return differences

    def _normal(self, name: str) -> NormalLevels:
        return self.novelty if name == "novelty" else self.statistics

    def _levels(self, outputs: dict) -> dict[str, dict[str, torch.Tensor]]:
        return {name: self._normal(name).levels(values) for name, values in self._differences(outputs).items()}

    def _maps(self, levels: dict[str, dict[str, torch.Tensor]], logit: torch.Tensor) -> dict[str, torch.Tensor]:
        """The map (N,1,H,W) of each part, not yet standardised."""
        size = logit.shape[-2:]
        maps = {name: self._normal(name).log_map(values, size) for name, values in levels.items()}
        if "log_odds" in self.parts:
            maps["log_odds"] = log_odds(logit) - _at_positions(self.statistics.log_odds_positions, size)
        return maps

    def _sum(self, maps: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(self._deviations(name, values) for name, values in maps.items())

    def _deviations(self, name: str, values: torch.Tensor) -> torch.Tensor:
        mean, deviation = getattr(self.statistics, name)
        return (values - mean) / deviation

    # ---- what is normal ----

    @torch.no_grad()
    def measure(self, outputs: Callable[[], Iterable[dict]]) -> None:
        """Measure the statistics on good images, over all ranks.

        Args:
            outputs: gives RealNet's outputs in eval mode, the same batches each time; it is called twice. A rank may
                have no batch at all, but not all of them.
        """
        if self.kind == DISCRIMINATOR:
            return
        compared = [name for name in self.parts if name != "log_odds"]
        sums = {name: _ChannelSums(self._normal(name).planes) for name in compared}
        for output in outputs():
            for name, differences in self._differences(output).items():
                sums[name].add(differences)
        for name in compared:
            self._normal(name).set_means(sums[name])
        kept = [(self._levels(output), output["logit"]) for output in outputs()]
        for name in compared:
            self._normal(name).set_positions([levels[name] for levels, _ in kept])
        if "log_odds" in self.parts:
            self.statistics.log_odds_positions.copy_(_mean_at_positions([log_odds(logit) for _, logit in kept]))
        maps = [self._maps(levels, logit) for levels, logit in kept]
        for name in self.parts:
            self._measure_deviation(name, [batch[name] for batch in maps])
        if len(self.parts) > 1:
            self._measure_deviation("total", [self._sum(batch) for batch in maps])

    def _measure_deviation(self, name: str, maps: list[torch.Tensor]) -> None:
        sums = torch.zeros(3, dtype=torch.float64)
        for values in maps:
            flat = values.float().flatten()
            sums += torch.stack([flat.sum(), (flat**2).sum(), torch.full_like(flat[0], len(flat))]).cpu()
        total, squares, count = distributed.all_reduce_sum(sums)
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=1e-12).sqrt()
        getattr(self.statistics, name).copy_(torch.stack([mean, deviation]))


class _ChannelSums:
    """Means of channels by block, over batches and ranks."""

    def __init__(self, planes: dict[str, int]) -> None:
        # On the CPU: not every device has float64.
        self.sums = {block: torch.zeros(channels + 1, dtype=torch.float64) for block, channels in planes.items()}

    def add(self, differences: dict[str, torch.Tensor]) -> None:
        for block, values in differences.items():
            self.sums[block][:-1] += values.float().sum(dim=(0, 2, 3)).cpu()
            self.sums[block][-1] += values[:, 0].numel()

    def means(self) -> dict[str, torch.Tensor]:
        totals = {block: distributed.all_reduce_sum(sums) for block, sums in self.sums.items()}
        return {block: total[:-1] / total[-1] for block, total in totals.items()}


def log_odds(logit: torch.Tensor) -> torch.Tensor:
    """Logarithm of the odds of an anomaly: (N,2,H,W) -> (N,1,H,W)."""
    return logit[:, 1:] - logit[:, :1]


def _at_positions(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(grid[None, None], size, mode="bilinear", align_corners=False)


def _mean_at_positions(maps: list[torch.Tensor]) -> torch.Tensor:
    """Mean of maps (N,1,h,w) over images and ranks, as a smoothed grid (32,32) on the CPU."""
    sums, count = torch.zeros(GRID, GRID), torch.zeros(())
    for values in maps:
        sums += F.adaptive_avg_pool2d(values.float(), (GRID, GRID)).sum(dim=(0, 1)).cpu()
        count += len(values)
    mean = distributed.all_reduce_sum(sums) / distributed.all_reduce_sum(count)
    padded = F.pad(mean[None, None], (SMOOTHED // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, SMOOTHED, stride=1)[0, 0]
