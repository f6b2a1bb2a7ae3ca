"""Performance maximisation: gradient descent on the gates of a frozen network, led by loss, cost and accuracy.

Gao et al., "Network Pruning via Performance Maximization", CVPR 2021. Over gates `a` it minimises

    L(f(x; a), y) + lambda R(T(a)) + log(1 / PN(a)),

the loss, a penalty on too high a cost, and the reciprocal of the accuracy that a performance network predicts. That one
learns meanwhile from a memory of architectures tried and their accuracies on minibatches. Its gradient is made
orthogonal to that of the loss in each layer, so that it adds what the loss does not say.

Cost of a step: one forward pass of the network and one backward pass without gradients of weights, plus small change:
all gradients are taken with respect to the sample, whose own gradient to the gates is one number each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nni_plugin.errors import DataError, SearchError
from nni_plugin.groups import ChannelGroup
from nni_plugin.performance.accuracy import AccuracyFn, GatedNetwork, LossFn, top1
from nni_plugin.performance.cost import CostTarget
from nni_plugin.performance.gates import DifferentiableGates
from nni_plugin.performance.hooks import GateHooks
from nni_plugin.performance.learner import PredictorLearner
from nni_plugin.performance.memory import check_accuracy
from nni_plugin.performance.options import SearchOptions
from nni_plugin.performance.projection import orthogonal_part


@dataclass(frozen=True)
class StepRecord:
    """What one step saw.

    Args:
        loss: Of the sampled network on the minibatch.
        accuracy: The same network's, in [0, 1].
        cost_ratio: Its cost as a fraction of the dense network's.
        penalty: The cost penalty, before its weight.
        predicted: The accuracy that the performance network predicted of it; `nan` before it has a say.
        predictor_loss: Of the performance network on entries of the memory; `nan` before it learns.
    """

    loss: float
    accuracy: float
    cost_ratio: float
    penalty: float
    predicted: float
    predictor_loss: float


class PerformanceMaximization:
    """A search for the gates of one network.

    Args:
        model: The network; frozen and in eval mode during a step, untouched between steps.
        groups: The groups that get gates.
        target: What the network may cost, on a layout of the same groups.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar; it calls `model` once.
        options: How the search goes.
        accuracy_fn: `accuracy_fn(output, batch)` -> a fraction in [0, 1].

    Attributes:
        gates: The gates.
        network: The network with its gates, e.g. for `network.evaluate(architecture, batches)` inside `with network:`.
        learner: The performance network and its memory; None for `mode="gates-only"`.
        steps_done: Steps made so far.
        history: A record for each.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        target: CostTarget,
        loss_fn: LossFn,
        options: SearchOptions | None = None,
        accuracy_fn: AccuracyFn = top1,
    ) -> None:
        self.model, self.target, self.options = model, target, options or SearchOptions()
        chosen = self.options
        device = next(model.parameters()).device
        self.gates = DifferentiableGates(
            groups,
            temperature=chosen.temperature,
            offset=chosen.offset,
            init_std=chosen.init_std,
            straight_through=chosen.straight_through,
            seed=chosen.seed,
            device=device,
        )
        self.layout = self.gates.layout
        self.network = GatedNetwork(model, GateHooks(model, self.layout), loss_fn, accuracy_fn)
        # Fused kernels would differ between devices; these vectors are short.
        self._gate_optimizer = torch.optim.AdamW(
            [self.gates.logits], lr=chosen.gate_lr, weight_decay=chosen.gate_decay, foreach=False
        )
        self.learner = PredictorLearner(self.layout.widths, chosen, device) if chosen.predicts else None
        self._generator = torch.Generator().manual_seed(chosen.seed + 1)
        self.steps_done = self._pass = self._position = 0
        self.history: list[StepRecord] = []

    @property
    def done(self) -> bool:
        """Whether all steps have been made."""
        return self.steps_done >= self.options.steps

    # -- the search ---------------------------------------------------------------------------------------

    def run(
        self, batches: Iterable[Any], on_step: Callable[[PerformanceMaximization], object] | None = None
    ) -> PerformanceMaximization:
        """Make the steps that are left.

        Args:
            batches: Minibatches of training data, gone through again and again; before each pass `set_epoch(pass)` is
                called on them and their sampler where it exists. A search that is resumed leaves out those that it
                has seen in its pass, so it equals one that was never killed where a pass can be repeated: a list, or
                a loader seeded by its epoch.
            on_step: Called after each step, e.g. to save `state_dict()`.

        Raises:
            DataError: There is no minibatch.
            SearchError: A loss, a gate or an accuracy makes no sense.
        """
        chosen = self.options
        bar = tqdm(total=chosen.steps, initial=self.steps_done, desc="search", unit="step", delay=2, disable=None)
        with bar, self.network:
            while self.steps_done < chosen.steps:
                _begin_pass(batches, self._pass)
                seen = 0
                for batch in batches:
                    seen += 1
                    if seen <= self._position:
                        continue
                    record = self.step(batch)
                    self._position = seen
                    bar.set_postfix(_shown(record), refresh=False)
                    bar.update()
                    if on_step is not None:
                        on_step(self)
                    if self.steps_done == chosen.steps:
                        return self
                if seen == 0:
                    raise DataError("There is no minibatch to search on: the loader is empty (or used up).")
                self._pass, self._position = self._pass + 1, 0
        return self

    def step(self, batch: Any) -> StepRecord:
        """Draw one architecture, and move the gates and the performance network by one step each.

        Args:
            batch: A minibatch, anything that `loss_fn` takes.

        Raises:
            SearchError: All steps are done, a loss or gradient is not finite (the gates are as before the step then),
                or the accuracy is no fraction.
        """
        if self.done:
            raise SearchError(f"All {self.options.steps} steps of the search have been made.")
        before = self._generator.get_state()
        try:
            return self._step(batch)
        except BaseException:
            self._generator.set_state(before)  # the step can be made again, on another minibatch
            raise

    def _step(self, batch: Any) -> StepRecord:
        with self.network, torch.enable_grad():
            sample = self.gates(self._generator)
            (slope,) = torch.autograd.grad(sample.sum(), self.gates.logits)  # each entry depends on its own gate alone
            architecture = sample.detach().requires_grad_()
            loss, accuracy, _ = self.network.run(architecture, batch)
            if not loss.requires_grad:
                raise SearchError("The loss does not depend on the gates: loss_fn must not run under no_grad().")
            (by_loss,) = torch.autograd.grad(loss, architecture)
            cost = self.target.objective(architecture)
            penalty = self.target.penalty(cost)
            (by_cost,) = torch.autograd.grad(penalty, architecture)
            by_loss = by_loss * slope
            gradient = by_loss + self.options.cost_weight * by_cost.to(slope) * slope
            predicted = None
            if self.learner is not None and self.learner.leads:
                by_performance, predicted = self.learner.maximise(architecture, self._generator)
                by_performance = by_performance * slope
                if self.options.project:
                    by_performance = orthogonal_part(by_performance, by_loss, self.layout.owner)
                gradient = gradient + self.options.performance_weight * by_performance
            # One transfer for all numbers: each would wait for the device by itself.
            finite = torch.isfinite(gradient).all()
            seen = [loss, accuracy, cost, penalty, finite, *([] if predicted is None else [predicted])]
            values = torch.stack([value.detach().double().to(slope.device) for value in seen]).tolist()
            check_accuracy(values[1])
            if not math.isfinite(values[0]) or values[4] != 1:
                raise SearchError(
                    f"The loss is {values[0]} and the gates' gradient {'' if values[4] else 'not '}finite in step "
                    f"{self.steps_done + 1}: look at the data and the network's weights. The gates are as before it."
                )
            self._move(gradient)
            learned = math.nan
            if self.learner is not None:
                learned = self.learner.learn(architecture.detach(), values[1], self._generator)
        record = StepRecord(
            loss=values[0],
            accuracy=values[1],
            cost_ratio=values[2] / self.target.objective.dense,
            penalty=values[3],
            predicted=math.nan if predicted is None else values[5],
            predictor_loss=learned,
        )
        self.steps_done += 1
        self.history.append(record)
        return record

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return an architecture drawn from the gates as they are, shape `[N]`, without gradient."""
        with torch.no_grad():
            drawn: Tensor = self.gates(generator)
        return drawn

    # -- state --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that a search needs to go on, as nested dicts and lists of tensors, numbers and text."""
        return {
            **self._identity(),
            "logits": self.gates.logits.detach().clone(),
            "gate_optimizer": copy.deepcopy(self._gate_optimizer.state_dict()),
            "learner": None if self.learner is None else self.learner.state_dict(),
            "generator": self._generator.get_state(),
            "counts": [self.steps_done, self._pass, self._position],
            "history": [list(astuple(record)) for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            SearchError: The state is of another network, limit or of other options.
        """
        ours = self._identity()
        for name, value in ours.items():
            if state[name] != value:
                raise SearchError(f"The saved search has other {name}: {state[name]!r}, expected {value!r}.")
        with torch.no_grad():
            self.gates.logits.copy_(state["logits"])
        self._gate_optimizer.load_state_dict(state["gate_optimizer"])
        if self.learner is not None:
            self.learner.load_state_dict(state["learner"])
        self._generator.set_state(state["generator"].cpu())
        self.steps_done, self._pass, self._position = state["counts"]
        self.history = [StepRecord(*row) for row in state["history"]]

    def _identity(self) -> dict[str, Any]:
        """Return what a state must share with the search that takes it."""
        gates = dict(zip(self.layout.slices, self.layout.widths, strict=True))
        return {"options": asdict(self.options), "gates_of": gates, "limit": self.target.limit}

    # -- how it works -------------------------------------------------------------------------------------

    def _move(self, gradient: Tensor) -> None:
        chosen = self.options
        late = self.steps_done >= chosen.lr_at * chosen.steps
        for group in self._gate_optimizer.param_groups:
            group["lr"] = chosen.gate_lr * (chosen.lr_factor if late else 1.0)
        self.gates.logits.grad = gradient
        self._gate_optimizer.step()
        self.gates.logits.grad = None


def _begin_pass(batches: Iterable[Any], number: int) -> None:
    for part in (batches, getattr(batches, "sampler", None)):
        set_epoch = getattr(part, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)


def _shown(record: StepRecord) -> dict[str, str]:
    """Return what the progress bar shows."""
    shown = {"loss": f"{record.loss:.3f}", "cost": f"{record.cost_ratio:.3f}"}
    if not math.isnan(record.predictor_loss):
        shown["PN loss"] = f"{record.predictor_loss:.4f}"
    return shown
