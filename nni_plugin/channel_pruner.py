"""Prune channels while a training loop runs: score, mask, cut, and know the plan at any time.

A callback for any loop. Between the backward pass and the optimizer's step call `on_backward(loss)`, after it
`on_step()`. Channels are held at zero from the moment they are chosen; the network is cut physically when the
budget is met (`cut="end"`), after every pruning step (`"step"`) or by the caller (`"never"`); the plan is the
same. It is always in the numbering of the dense network.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import (
    Parity,
    apply_plan,
    carry_optimizer,
    cut_channels,
    find_groups,
    sound_groups,
    verify,
    warn_of_unreached,
)
from nni_plugin.budget_fit import BudgetFit
from nni_plugin.budgets import Budget, Latency, Size
from nni_plugin.checks import (
    CutWhen,
    Selection,
    checked_budget,
    checked_choice,
    checked_criterion,
    checked_schedule,
)
from nni_plugin.compensation import fold_factors
from nni_plugin.cost import on_device_of
from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import CriterionError, GraphError, ScheduleError, SurgeryError
from nni_plugin.group_rules import GroupRules
from nni_plugin.groups import ChannelGroup
from nni_plugin.latency_budget import LatencyMeter
from nni_plugin.live_plan import LivePlan
from nni_plugin.masks import Masks
from nni_plugin.narrowing import narrowed
from nni_plugin.parts import DEFAULT_PARTS
from nni_plugin.plan import PruningPlan
from nni_plugin.processes import agreed, pooled_mean
from nni_plugin.rounding import rounding_of
from nni_plugin.schedules import Schedule
from nni_plugin.scorer import ForeignCriterion, Scorer
from nni_plugin.selection import Ranking
from nni_plugin.wrappers import average_of, checked_network


class ChannelPruner:
    """Drives one network to a budget by a criterion and a schedule.

    Args:
        model: The network to prune, left as it was by this call; wrappers (DDP, `torch.compile`) are looked through.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        criterion: One of `nni_plugin.criteria`, or any stock importance of Torch-Pruning, which reads the
            gradients of the last minibatch before a pruning step.
        budget: What the result may cost.
        schedule: When to prune.
        round_to: Widths become multiples of this (the nearest), or stay whole; None: 8 on CUDA, else 1.
        min_channels: No group gets narrower.
        ignore: Layers to leave whole; the classifier always is.
        select: Which groups may be pruned: `"all"`, those that residual additions couple across blocks
            (`"skip-only"`), or the others (`"no-skip"`).
        cost_aware: Rank by loss per unit of what the budget counts instead of loss per channel; None: as the
            criterion wants it. Under `Latency` a knapsack weighs loss against time in any case.
        divide_by_blocks: Divide the score of a residual group by the number of blocks that share its gate.
        stages: Fraction of channels to keep by prefix of layer names: removed fractions are in this proportion, at
            the budget; layers of no stage stay whole. Empty: one ranking over all layers.
        isomorphic: Compare groups built alike with each other alone; all kinds lose the same fraction.
        parts: Which parts of a transformer may shrink: `"heads"` or `"head_dim"`, `"mlp"`, `"embedding"`.
        cut: When channels leave the network physically.
        optimizer: The optimizer that trains the network, to be cut along; a training state sets it too.
        ema: A moving average of the network, likewise, in timm's or torch's wrapper or as it is; to be updated after
            `on_step()`.

    Raises:
        ModelError: The model is no network, or the average not one of it.
        ScheduleError: The schedule is none.
        GraphError: The network cannot be traced, or nothing in it may be pruned.
        BudgetError: The budget is none, or cannot be met even with every group at its smallest.
        CriterionError: The criterion is none, such as a name or a class, or its order is to be divided by blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        criterion: Criterion | ForeignCriterion,
        budget: Budget,
        *,
        schedule: Schedule | None = None,
        round_to: int | None = None,
        min_channels: int = 1,
        ignore: Iterable[str | nn.Module] = (),
        select: Selection = "all",
        cost_aware: bool | None = None,
        divide_by_blocks: bool = False,
        stages: Mapping[str, float] | None = None,
        isomorphic: bool = False,
        parts: Collection[str] = DEFAULT_PARTS,
        cut: CutWhen = "end",
        optimizer: torch.optim.Optimizer | None = None,
        ema: nn.Module | None = None,
    ) -> None:
        self.model, self.example_inputs = (model := checked_network(model)), example_inputs
        self.budget, self.schedule = checked_budget(budget), checked_schedule(schedule)
        self.round_to, self.min_channels = rounding_of(round_to, model), min_channels
        self.cut_when: CutWhen = checked_choice("cut", cut, CutWhen, ScheduleError)
        self.scorer = Scorer(checked_criterion(criterion))
        self.rules = GroupRules(select, parts, stages or {}, isomorphic, divide_by_blocks)
        self.cost_aware = self.scorer.cost_aware if cost_aware is None else cost_aware
        self.optimizer, self.ema = optimizer, None if ema is None else average_of(model, ema)
        self._state: Any = None
        self._earlier: PruningPlan | None = getattr(model, "pruning_plan", None)
        self.meter = LatencyMeter(model, self._inputs(), budget) if isinstance(budget, Latency) else None
        groups = find_groups(
            model, self._inputs(), ignore=ignore, keep_host=self.scorer.foreign, parts=self.rules.parts
        )
        self._take(sound_groups(model, groups, self._inputs()))
        self._whole = {group.name: group.fixed for group in self._all_groups if group.fixed is not None}
        warn_of_unreached(model, self._inputs())
        self.dense: Size = self._fit.dense
        self.live = LivePlan(self.groups)
        self.rules.check(self.scorer, list(self.live.dense_widths))
        self._since_check, self._window, self._loss_sum = 0, 0, 0.0
        self._counted: Size | None = None
        self.done = False
        self.parity: Parity | None = None
        self.timing: dict[str, Any] = {}
        self.seconds = {"score": 0.0, "plan": 0.0, "surgery": 0.0}
        # Reachable at all? How narrow the network can get does not depend on the scores.
        level = {group.name: torch.zeros(group.width) for group in self.groups}
        self._fit.check(self._ranking(level))

    # -- what a training loop calls ---------------------------------------------------------------------

    @property
    def needs_graph(self) -> bool:
        """Whether the criterion needs `loss.backward(create_graph=True)`."""
        return self.scorer.needs_graph and not self.done

    def on_train_begin(self, state: Any) -> None:
        """Take the optimizer and the moving average from a training state, to cut them along; start watching."""
        self.optimizer, self._state = state.optimizer, state
        self.ema = None if state.ema is None else average_of(self.model, state.ema)
        self.open()

    def on_backward(self, loss: float, batch: Any = None, *, loss_scale: float | None = None) -> None:
        """Take in a minibatch: gradients are there (unscaled), nothing is clipped or stepped yet.

        Args:
            loss: The minibatch's training loss.
            batch: The minibatch, for a criterion that runs the network on it (the Oracle); None: the training state's.
            loss_scale: What the loss was multiplied with for the backward pass, by a gradient scaler; None: what the
                training state says, or 1.

        Raises:
            CriterionError: The loss is not finite, or a layer lacks the gradients to score it.
        """
        if not math.isfinite(loss):
            raise CriterionError(
                f"The loss of a minibatch is {loss}; look at the data and the weights, or lower the learning rate."
            )
        with self._timed("score"):
            if not self.done:
                self._loss_sum += loss
                self._since_check += 1
                self._window += 1
                batch = getattr(self._state, "batch", None) if batch is None else batch
                loss_scale = getattr(self._state, "loss_scale", 1.0) if loss_scale is None else loss_scale
                self.scorer.update(self.model, self.groups, due=self._due(), batch=batch, loss_scale=loss_scale)
            self._masks.zero_grads()

    def on_step(self) -> None:
        """After the optimizer's step: hold removed channels at zero, prune when the schedule says so.

        Raises:
            SurgeryError: The compact network would not compute what the masked one does; nothing is cut.
        """
        with self._timed("plan"):
            self._masks.zero_weights()
        if self.done:
            return
        if self._due():
            self.step()
            if self.optimizer is None and self.live.is_cut:
                warnings.warn(
                    "Channels were cut without an optimizer to cut along, whose next step will fail: give "
                    "ChannelPruner(optimizer=...), or build it anew.",
                    stacklevel=2,
                )
        elif self._since_check >= (self.schedule.minibatches or math.inf):
            self._since_check, self._loss_sum = 0, 0.0  # checked and skipped: the window goes on growing

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        """Add how far pruning has come to the epoch's metrics."""
        size = self.size()
        metrics["kept"] = size.channels / self.dense.channels
        metrics["macs_ratio"] = size.cost.macs / self.dense.cost.macs

    def step(self) -> None:
        """Take the schedule's next step now, with what has been collected since the last."""
        self.scorer.read_unless_read(self.groups)
        self._prune(final=self.schedule.channels is None and len(self.steps) + 1 >= (self.schedule.steps or 1))

    def finish(self) -> PruningPlan:
        """Go to the budget now, with what has been collected, if the schedule has not got there; return the plan.

        Raises:
            ScheduleError: Nothing has been collected since the last step.
        """
        if not self.done:
            if self._window == 0 and self.scorer.needs_data:
                raise ScheduleError(
                    "No minibatch has run since the last pruning step, so there is nothing to rank by: run some, or "
                    "shorten the schedule (fewer minibatches or more channels a step)."
                )
            self.open()  # a criterion without data reads this network's weights
            self.scorer.read(self.groups)
            self._prune(final=True)
        return self.plan()

    def open(self) -> None:
        """Start watching the network, before its first forward pass; `close()` ends it."""
        if not self.done:
            self._masks.zero_weights()  # whatever has been put into the network since, dead channels stay dead
            self.scorer.open(self.model, self.groups)

    def close(self) -> None:
        """Stop watching; whatever was put on the network leaves it."""
        self.scorer.close()

    def __enter__(self) -> ChannelPruner:
        """Start watching the network."""
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self.close()

    # -- what it knows ----------------------------------------------------------------------------------

    def size(self) -> Size:
        """Return the size of the network without the channels removed so far."""
        return self._counted or self._fit.cost.predict(self.live.kept)

    @property
    def steps(self) -> list[dict[str, float]]:
        """One record a pruning step: sizes, the loss before, the predicted change."""
        return self.live.steps

    def plan(self) -> PruningPlan:
        """Return the plan so far, on the dense network."""
        asked = {
            "criterion": str(self.scorer),
            "budget": repr(self.budget),
            "schedule": repr(self.schedule),
            "round_to": self.round_to,
            "min_channels": self.min_channels,
            "cost_aware": self.cost_aware,
            **self.rules.record(),
            **({"latency": self.timing} if self.timing else {}),
            **({"whole": self._whole} if self._whole else {}),
        }
        identity = getattr(self.model, "nni_plugin_identity", None)
        return self.live.whole(self.scorer.range, self.dense, self.size(), identity, asked)

    def cut(self) -> None:
        """Remove the channels chosen so far from the network, its optimizer and its moving average.

        Raises:
            SurgeryError: The compact network would not compute what the masked one does; nothing is cut.
        """
        with self._timed("surgery"):
            plan = self.live.relative()
            if plan.channels_removed:
                self.parity = verify(self.model, plan, self._inputs(), groups=self._all_groups)
                if not self.parity.ok:
                    raise SurgeryError(f"{self.parity}. The network is unchanged; leave layers whole with `ignore`.")
            watching = self.scorer.collecting
            self._remove_physically(plan)
            if watching:  # cut by the caller, in the middle of a window
                self.open()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on, as nested dicts of tensors and numbers."""
        return {
            "live": self.live.state_dict(),
            "since": [self._since_check, self._window, self._loss_sum],
            "done": self.done,
            "timing": self.timing,
            "seconds": dict(self.seconds),
            "parity": None if self.parity is None else dataclasses.asdict(self.parity),
            "scorer": self.scorer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, on a freshly built dense network, which is cut or masked as it was then.

        Raises:
            ScheduleError: The state is of another network.
        """
        live = state["live"]
        self.live.check(live)
        self.done, self.seconds = bool(state["done"]), dict(state["seconds"])
        self.live.steps = [dict(step) for step in live["steps"]]
        if {name: len(index) for name, index in live["origin"].items()} != self.live.dense_widths:
            self.live.kept = dict(live["origin"])
            self.scorer.range = dict(state["scorer"]["range"])  # part of the plan that the network will carry
            self._remove_physically(self.live.relative())
        self.live.load_state_dict(live)  # the factors have been folded into the saved weights
        if self.live.is_cut:
            self._note_plan()
        self._masks.remove(self.live.kept)
        self._masks.zero_weights()
        self._since_check, self._window, self._loss_sum = state["since"]
        self.timing = dict(state["timing"])
        self.parity = None if state["parity"] is None else Parity(**state["parity"])
        self.close()
        self.open()  # on the groups as they are now, before the open window's sums come back
        self.scorer.load_state_dict(state["scorer"])

    # -- how it works -----------------------------------------------------------------------------------

    def _take(self, groups: list[ChannelGroup]) -> None:
        """Work on these groups from now on."""
        self._all_groups = groups = self.rules.selected(groups)
        self.groups = [group for group in groups if group.fixed is None]
        if not self.groups:
            reasons = "; ".join(f"{group.name}: {group.fixed}" for group in groups[:5])
            reasons = reasons or "It has no layer of a kind that can be cut: quantise, convert or script it afterwards."
            raise GraphError(f"Nothing in {type(self.model).__name__} may be pruned. {reasons}")
        dense = getattr(self, "dense", None)
        self._fit = BudgetFit(self.budget, self.model, self._inputs(), self.groups, self._slim, self.meter, dense)
        self._masks = Masks(self.model, self.groups)

    @property
    def _additive(self) -> bool:
        """Whether scores say what channels are worth, and not when they go (in one order, or at a stage's turn)."""
        return not (self.scorer.is_ranking or self.rules.in_turns)

    def _due(self) -> bool:
        if not self.schedule.due(self._since_check, -math.inf):
            return False  # too early at any loss: nothing to exchange
        mean_loss = pooled_mean(self._loss_sum, self._since_check)  # of all processes, or they would part here
        return mean_loss is not None and self.schedule.due(self._since_check, mean_loss)

    def _ranking(self, scores: Mapping[str, Tensor]) -> Ranking:
        return self._fit.ranking(
            self.groups,
            self.rules.comparable(self.groups, scores, self.live.dense_widths),
            additive=self._additive,
            round_to=self.round_to,
            min_channels=self.min_channels,
        )

    def _prune(self, *, final: bool) -> None:
        """Take one step of the schedule, or go all the way to the budget."""
        with self._timed("plan"):
            weighs = self.meter is not None and self._additive  # a knapsack weighs loss against time by itself
            costs = self._fit.savings(self.groups, self.live.kept) if self.cost_aware and not weighs else None
            mean_loss = pooled_mean(self._loss_sum, self._since_check) or 0.0
            ranking = self._ranking(self.scorer.scores(self.groups, self.live.kept, self.schedule.momentum, costs))
            last = self._fit.enough(ranking)
            units = None if final else self._partial(ranking)
            if units is not None and units < last:
                kept = ranking.kept(units)
            else:
                kept, self._counted, self.timing = self._fit.exact(ranking, ranking.kept(last))
                self.done = True
            kept, self.done, self._counted = agreed((kept, self.done, self._counted))
            said = agreed(self.scorer.conclude(self.live.kept, kept))
            self.live.kept = kept
            self._compensate(said.factors)
            self._masks.remove(kept)
            self._masks.zero_weights()
            if self.ema is not None:  # once: updated after on_step, the average of zeros stays zero
                average = Masks(self.ema, self.groups)
                average.remove(kept)
                average.zero_weights()
            self._since_check, self._window, self._loss_sum = 0, 0, 0.0
            size = self.size()
            self.live.record(size, mean_loss if self.scorer.needs_data else None, said.predicted_loss_change)
        if self.done:
            self.close()
            if all(len(kept[name]) <= self.min_channels for name in kept) and len(kept) > 1:
                again = " Was the machine busy? Measure again." if self.meter is not None else ""
                warnings.warn(
                    f"All layers that may be pruned are at their smallest: nothing less meets {self.budget}.{again}",
                    stacklevel=4,
                )
            if size.channels == self.dense.channels:
                warnings.warn(
                    f"The plan removes nothing: {self.budget} is met by the dense network ({self.dense.cost}).",
                    stacklevel=4,
                )
        if self.cut_when == "step" or (self.cut_when == "end" and self.done):
            self.cut()
        self.open()

    def _partial(self, ranking: Ranking) -> int | None:
        """Return how many units go in a step that is not the last."""
        if self.schedule.channels is not None:
            asked = sum(len(index) for index in self.live.kept.values()) - self.schedule.channels
            return ranking.fewest(lambda kept: sum(len(index) for index in kept.values()) <= asked)
        assert self.schedule.steps is not None
        return self._fit.part(ranking, self.live.kept, steps_left=self.schedule.steps - len(self.steps))

    def _compensate(self, factors: Mapping[str, Tensor]) -> None:
        """Fold what the gates that stay have become into the network and its average."""
        moved = self.live.multiply(factors)
        for network in (self.model, self.ema):
            if network is not None and moved:
                fold_factors(network, self.groups, moved)

    def _slim(self, kept: Mapping[str, Tensor]) -> nn.Module:
        slim = copy.deepcopy(self.model)
        cut_channels(slim, self.live.relative(kept), self._all_groups)
        return slim

    def _remove_physically(self, plan: PruningPlan) -> None:
        if plan.channels_removed:
            apply_plan(self.model, plan, self._inputs(), groups=self._all_groups, check=False)
            if self.optimizer is not None:
                carry_optimizer(self.optimizer, plan)
            if self.ema is not None:
                cut_channels(self.ema, plan, self._all_groups)
        kept = self.live.kept
        self.scorer.narrow(kept)
        self._since_check, self._window, self._loss_sum = 0, 0, 0.0
        groups = narrowed(self._all_groups, kept)
        self.live.narrow()
        if self.scorer.foreign and not self.done:
            hosts = {
                group.name: group.host
                for group in find_groups(self.model, self._inputs(), keep_host=True, parts=self.rules.parts)
            }
            groups = [dataclasses.replace(group, host=hosts.get(group.name)) for group in groups]
        self._take(groups)
        self._note_plan()

    def _note_plan(self) -> None:
        """Let the network carry the plan of what has left it."""
        whole = self.plan()
        self.model.pruning_plan = whole if self._earlier is None else self._earlier.then(whole)  # type: ignore[assignment]

    def _inputs(self) -> Any:
        self.example_inputs = on_device_of(self.model, self.example_inputs)
        return self.example_inputs

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begun
