"""When to prune while minibatches run: at once, step by step, or only while the training loss allows it.

Molchanov et al., CVPR 2019, supplement 6.2. The paper's settings: 100 channels every 30 minibatches; scores are
averaged over the window and, with momentum 0.9, over windows. In continuous pruning a step is skipped while the
mean training loss since the last check is above the threshold; the window then goes on growing.
"""

from __future__ import annotations

from dataclasses import dataclass

from nni_plugin.errors import ScheduleError


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScheduleError(f"{name} must be an integer of at least 1, got {value!r}.")


def _check_momentum(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ScheduleError(f"momentum must be at least 0 and below 1, got {value!r}.")


@dataclass(frozen=True)
class OneShot:
    """Score over `minibatches` (None: all that are given), then go to the budget in one step."""

    minibatches: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.minibatches is not None:
            _check_count("minibatches", self.minibatches)

    channels = None
    steps = 1
    momentum = 0.0

    def due(self, minibatches: int, mean_loss: float) -> bool:
        """Tell whether to prune after so many minibatches since the last step."""
        return self.minibatches is not None and minibatches >= self.minibatches


@dataclass(frozen=True)
class Gradual:
    """Go to the budget in equal steps of what it counts, each on fresh scores.

    Args:
        steps: Number of steps.
        minibatches: Window of each step; None: all that are given (without training), once a step.
        momentum: Weight of the earlier scores in the moving average over windows.
    """

    steps: int = 10
    minibatches: int | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        _check_count("steps", self.steps)
        if self.minibatches is not None:
            _check_count("minibatches", self.minibatches)
        _check_momentum(self.momentum)

    channels = None

    def due(self, minibatches: int, mean_loss: float) -> bool:
        """Tell whether to prune after so many minibatches since the last step."""
        return self.minibatches is not None and minibatches >= self.minibatches


@dataclass(frozen=True)
class Iterative:
    """Remove `channels` coupled channels every `minibatches` until the budget is met.

    Args:
        channels: Channels removed in a step.
        minibatches: Length of the window over which squares are averaged.
        momentum: Weight of the earlier scores in the moving average over windows.
    """

    channels: int = 100
    minibatches: int = 30
    momentum: float = 0.9

    steps = None

    def __post_init__(self) -> None:
        """Check the values."""
        _check_count("channels", self.channels)
        _check_count("minibatches", self.minibatches)
        _check_momentum(self.momentum)

    def due(self, minibatches: int, mean_loss: float) -> bool:
        """Tell whether to prune after so many minibatches since the last step or check."""
        return minibatches >= self.minibatches


@dataclass(frozen=True)
class Continuous(Iterative):
    """As iterative, but only when the mean training loss since the last check is at most the threshold.

    Args:
        channels: Channels removed in a step.
        minibatches: Minibatches between checks.
        momentum: Weight of the earlier scores in the moving average over windows.
        loss_threshold: Largest mean training loss at which a step is taken.
    """

    loss_threshold: float = 1.04

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        threshold = self.loss_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
            raise ScheduleError(f"loss_threshold must be a number above 0, got {threshold!r}.")

    def due(self, minibatches: int, mean_loss: float) -> bool:
        """Tell whether to prune after so many minibatches since the last check, at this mean loss."""
        return super().due(minibatches, mean_loss) and mean_loss <= self.loss_threshold


Schedule = OneShot | Gradual | Iterative | Continuous
