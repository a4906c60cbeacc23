"""The anomaly map, from the discriminator's logits and the reconstruction residual."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from models.afs import resize
from utils import distributed
from utils.errors import UsageError

SCORES = ("discriminator", "residual", "both")
FLOOR = 0.01  # of the mean over channels: a channel that hardly ever differs would drown the others
GRID, SMOOTHED = 32, 5  # cells per side of the maps of what is normal where, and of the box that smooths them
IMAGE_SHARE = 0.5  # of the image's mean that is taken off
OFFSET = 4.0  # deviations above normal that give 0.5


class AnomalyScore(nn.Module):
    """Turns residuals and logits into a map in [0, 1].

    discriminator: the softmax of the logits (RealNet, section 3.3). residual: see log_residual. both: the sum of the
    residual's and the log-odds' deviations from normal. The discriminator takes thousands of steps to learn what the
    residual shows from the start, and learns only what training anomalies look like.

    Residual and log-odds are compared with what is normal at their position: padding and resampling make the borders of
    feature maps differ, and parts vary more in some places than in others. 0.5 lies 4 deviations above normal.

    Args:
        planes: channels of each block.
        kind: "discriminator", "residual" or "both".

    Attributes:
        statistics: what is normal, measured by measure(); nothing for discriminator. <block>_mean (C,): means of the
            residual's channels. <block>_positions, log_odds_positions (32,32): means at positions, smoothed. residual,
            log_odds, total (2,): mean and deviation over all pixels.

    Shape:
        residual {block: (N,C,h,w)}, logit (N,2,H,W) -> (N,1,H,W)

    Raises:
        UsageError: an unknown kind.
    """

    def __init__(self, planes: dict[str, int], kind: str = "discriminator") -> None:
        super().__init__()
        if kind not in SCORES:
            raise UsageError(f"evaluator.score: {kind!r} is not one of {', '.join(SCORES)}")
        self.kind, self.planes = kind, planes
        self.statistics = nn.Module()
        if kind == "discriminator":
            return
        for block, channels in planes.items():
            self.statistics.register_buffer(f"{block}_mean", torch.ones(channels))
            self.statistics.register_buffer(f"{block}_positions", torch.ones(GRID, GRID))
        self.statistics.register_buffer("residual", torch.tensor([0.0, 1.0]))
        if kind == "both":
            self.statistics.register_buffer("log_odds_positions", torch.zeros(GRID, GRID))
            self.statistics.register_buffer("log_odds", torch.tensor([0.0, 1.0]))
            self.statistics.register_buffer("total", torch.tensor([0.0, 1.0]))

    def forward(self, residual: dict[str, torch.Tensor], logit: torch.Tensor) -> torch.Tensor:
        if self.kind == "discriminator":
            return logit.softmax(dim=1)[:, 1:]
        deviations = self._deviations("residual", self.log_residual(self.levels(residual), logit.shape[-2:]))
        if self.kind == "both":
            deviations = deviations + self._deviations("log_odds", self._log_odds(logit))
            deviations = self._deviations("total", deviations)
        return torch.sigmoid(deviations - OFFSET)

    def levels(self, residual: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Mean over each block's channels, each divided by its normal mean: {block: (N,1,h,w)}."""
        means = {block: getattr(self.statistics, f"{block}_mean") for block in residual}
        return {
            block: (values.float() / means[block][:, None, None]).mean(dim=1, keepdim=True)
            for block, values in residual.items()
        }

    def log_residual(self, levels: dict[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Mean over blocks of log(level / normal level at the position), less half of its mean over the image.

        Images that differ as a whole, by their exposure say, are not as anomalous as the same residual at one place.

        Returns:
            (N,1,*size)
        """
        logs = [
            torch.log(resize(level, size) / self._at_positions(block, size) + 1e-6) for block, level in levels.items()
        ]
        mean = torch.stack(logs).mean(dim=0)
        return mean - IMAGE_SHARE * mean.mean(dim=(2, 3), keepdim=True)

    def _log_odds(self, logit: torch.Tensor) -> torch.Tensor:
        return log_odds(logit) - self._at_positions("log_odds", logit.shape[-2:])

    def _at_positions(self, name: str, size: tuple[int, int]) -> torch.Tensor:
        grid = getattr(self.statistics, f"{name}_positions")[None, None]
        return F.interpolate(grid, size, mode="bilinear", align_corners=False)

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
        if self.kind == "discriminator":
            return
        self._measure_channels(outputs())
        kept = [(self.levels(output["residual"]), output["logit"]) for output in outputs()]
        for block in self.planes:
            positions = _mean_at_positions([levels[block] for levels, _ in kept])
            # A position where the levels are 0 would make every later one infinite.
            getattr(self.statistics, f"{block}_positions").copy_(positions.clamp(min=1e-6))
        residual = [self.log_residual(levels, logit.shape[-2:]) for levels, logit in kept]
        self._measure_deviation("residual", residual)
        if self.kind == "both":
            self.statistics.log_odds_positions.copy_(_mean_at_positions([log_odds(logit) for _, logit in kept]))
            odds = [self._log_odds(logit) for _, logit in kept]
            self._measure_deviation("log_odds", odds)
            pairs = zip(residual, odds, strict=True)
            self._measure_deviation(
                "total", [self._deviations("residual", r) + self._deviations("log_odds", o) for r, o in pairs]
            )

    def _measure_channels(self, outputs: Iterable[dict]) -> None:
        # On the CPU, as everywhere below: not every device has float64.
        sums = {block: torch.zeros(channels + 1, dtype=torch.float64) for block, channels in self.planes.items()}
        for output in outputs:
            for block, values in output["residual"].items():
                sums[block][:-1] += values.float().sum(dim=(0, 2, 3)).cpu()
                sums[block][-1] += values[:, 0].numel()
        for block, total in sums.items():
            total = distributed.all_reduce_sum(total)
            mean = total[:-1] / total[-1]
            floor = max(FLOOR * float(mean.mean()), 1e-12)
            getattr(self.statistics, f"{block}_mean").copy_(mean.clamp(min=floor))

    def _measure_deviation(self, name: str, maps: list[torch.Tensor]) -> None:
        sums = torch.zeros(3, dtype=torch.float64)
        for values in maps:
            flat = values.float().flatten()
            sums += torch.stack([flat.sum(), (flat**2).sum(), torch.full_like(flat[0], len(flat))]).cpu()
        total, squares, count = distributed.all_reduce_sum(sums)
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=1e-12).sqrt()
        getattr(self.statistics, name).copy_(torch.stack([mean, deviation]))


def log_odds(logit: torch.Tensor) -> torch.Tensor:
    """Logarithm of the odds of an anomaly: (N,2,H,W) -> (N,1,H,W)."""
    return logit[:, 1:] - logit[:, :1]


def _mean_at_positions(maps: list[torch.Tensor]) -> torch.Tensor:
    """Mean of maps (N,1,h,w) over images and ranks, as a smoothed grid (32,32) on the CPU."""
    sums, count = torch.zeros(GRID, GRID), torch.zeros(())
    for values in maps:
        sums += F.adaptive_avg_pool2d(values.float(), (GRID, GRID)).sum(dim=(0, 1)).cpu()
        count += len(values)
    mean = distributed.all_reduce_sum(sums) / distributed.all_reduce_sum(count)
    padded = F.pad(mean[None, None], (SMOOTHED // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, SMOOTHED, stride=1)[0, 0]
