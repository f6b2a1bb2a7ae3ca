"""What a pruning job asks for: the fields are the command line's flags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.budgets import Budget
from nni_plugin.checks import Selection
from nni_plugin.errors import TrainingError
from nni_plugin.layers.candidates import Candidates
from nni_plugin.network_job import NetworkJob
from nni_plugin.parts import DEFAULT_PARTS
from nni_plugin.schedules import Continuous, Iterative, OneShot, Schedule


@dataclass(frozen=True)
class Job(NetworkJob):
    """What to prune, how, and where to put it; the fields are those of :class:`NetworkJob` and these.

    Args:
        budget: What the result may cost.
        method: See `methods.METHODS`.
        schedule: `"one-shot"`, `"iterative"` or `"continuous"`.
        prune_channels: Channels removed in a step; None: so many that pruning is over in the first half of training.
        prune_every: Minibatches between steps; None: twenty steps or more in that half, at most 30 minibatches apart.
        loss_threshold: Largest mean training loss at which a continuous schedule prunes.
        score_batches: Minibatches that a one-shot schedule scores on; None takes all training data once (for `obs`,
            which keeps a row for every image, about 2,000 images). A search over gates takes a tenth, five at least,
            and holds a fifth of these out to choose on.
        score_steps: Steps in which a one-shot schedule goes to the budget, each on fresh scores without training
            between; None: 1, but 10 for a method that compensates (`obs`) where weights are not solved anew.
        search_steps: Minibatches of a search over gates (`nppm`, `differentiable-gates`, `nppm-linear`); None: 4,000.
        search_kwargs: Its further options, see `performance.SearchOptions`.
        round_to: Widths become multiples of this; None: of 8 on CUDA, else of 1.
        min_channels: No group gets narrower.
        ignore: Layers to leave whole, by name; of a method for layers the blocks that must stay.
        candidates: Of blocks inside blocks a method for layers removes the `"outermost"`, the `"innermost"` or `"all"`.
        select: Which groups may be pruned: `"all"`, `"skip-only"` or `"no-skip"`; None: all, but `"no-skip"` for a
            search over gates.
        cost_aware: Rank by loss per unit of what the budget counts; None: as the method wants it.
        divide_by_blocks: Divide the score of a residual group by the number of blocks that share its gate.
        stages: Fraction of channels to keep by stage (a prefix of layer names): removed fractions are in this
            proportion, at the budget; layers of no stage stay whole. Empty: all layers are ranked together.
        isomorphic: Compare layers built alike with each other alone; all kinds lose the same fraction.
        parts: Which parts of a transformer may shrink: `"heads"` or `"head_dim"`, `"mlp"`, `"embedding"`.
        reconstruct: After one-shot pruning solve each layer's weights anew so that it gives what it gave in the dense
            network; None: for `obs`.
        reestimate: Estimate the statistics of batch normalisations anew after pruning without training.
        finetune: Training of the pruned network (while it is pruned, unless one-shot).
        latency_batch_sizes: Batch sizes to measure the latency at.
    """

    budget: Budget
    _: KW_ONLY
    method: str = "taylor-fo"
    schedule: Literal["one-shot", "iterative", "continuous"] = "one-shot"
    prune_channels: int | None = None
    prune_every: int | None = None
    loss_threshold: float = 1.04
    score_batches: int | None = None
    score_steps: int | None = None
    search_steps: int | None = None
    search_kwargs: Mapping[str, Any] = field(default_factory=dict)
    round_to: int | None = None
    min_channels: int = 1
    ignore: tuple[str, ...] = ()
    candidates: Candidates = "outermost"
    select: Selection | None = None
    cost_aware: bool | None = None
    divide_by_blocks: bool = False
    stages: Mapping[str, float] = field(default_factory=dict)
    isomorphic: bool = False
    parts: tuple[str, ...] = DEFAULT_PARTS
    reconstruct: bool | None = None
    reestimate: bool = False
    finetune: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=0))
    latency_batch_sizes: tuple[int, ...] = (1, 64)

    def _values(self) -> dict[str, Any]:
        values = {**super()._values(), "budget": repr(self.budget)}
        del values["latency_batch_sizes"], values["finetune"]["checkpoint_every"]
        return values


def schedule_of(job: Job, steps: int, channels: int) -> Schedule:
    """Fill in what the user left open so that pruning is over within the first half of training.

    Args:
        job: What was asked.
        steps: Minibatches of fine-tuning.
        channels: Channels that may be pruned.

    Raises:
        TrainingError: A schedule within training, and there is no training.
    """
    if job.schedule == "one-shot":
        return OneShot()
    if steps == 0:
        raise TrainingError("--schedule iterative and continuous prune while they train: give --epochs above 0.")
    every = job.prune_every or max(1, min(30, steps // 40))
    number = job.prune_channels or math.ceil(channels / max(1, steps // 2 // every))
    if job.schedule == "continuous":
        return Continuous(number, every, loss_threshold=job.loss_threshold)
    return Iterative(number, every)
