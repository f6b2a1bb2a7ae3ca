"""One model, from its name to the pruned network loaded from disk: what must hold for it to count as covered.

    build     random weights, drawn statistics, images of the model's own size
    plan      to the MACs asked for, by random scores: every group is tried on a copy before it is trusted
    prove     the network with the plan's channels held at zero computes what the compact one does
    run       forward and backward, in train and in eval mode: finite, and a gradient wherever the dense network has one
    save      saved and loaded again: the same outputs and tensors bit by bit

A refusal is an error of ours that comes before anything is cut and names the module at fault. Everything else that
goes wrong is a failure.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nni_plugin.adapters.libraries import usual_input
from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.torch_pruning import apply_plan, find_groups, verify
from nni_plugin.budgets import MACs
from nni_plugin.checkpoint import from_pretrained, save_pretrained
from nni_plugin.cost import call, count, tensors_in
from nni_plugin.coverage.listing import Case
from nni_plugin.coverage.results import Status, one_line
from nni_plugin.criteria import Random
from nni_plugin.errors import BudgetError, ModelError, NNIPluginError
from nni_plugin.groups import ChannelGroup
from nni_plugin.machine import usable_device
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import plan_channels, unchanged
from nni_plugin.random_weights import randomise

BUDGET_TOLERANCE = 0.02
"""How far the MACs of the result may lie from what was asked for, as a share of that: 0.49 to 0.51 for 0.5."""

IMAGES = 2
"""Images in a minibatch: batch normalisation cannot train on one where maps are 1 x 1."""

_MOST_NAMED = 3
"""Groups that a reason names; of more, their number."""


@dataclass(frozen=True)
class Wanted:
    """What every model is to be brought to.

    Args:
        macs: Fraction of the multiply-accumulates to keep.
        seed: Of weights, statistics, images and scores.
        device: Where to do it; None: the best there is.
    """

    macs: float
    seed: int = 0
    device: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What came out; see :class:`~nni_plugin.coverage.results.Row`."""

    status: Status
    reason: str = ""


@dataclass(frozen=True)
class _Planned:
    """A plan, the groups it was made on, and which of them were found unsound, in words."""

    plan: PruningPlan
    groups: Sequence[ChannelGroup]
    left_whole: str


class _Wrong(Exception):
    """A check that does not hold."""


Note = Callable[[str, Mapping[str, float]], None]
"""Takes what is begun, in words, and the numbers that are known by then."""


def check_model(case: Case, wanted: Wanted, folder: Path, note: Note = lambda doing, numbers: None) -> Verdict:
    """Bring one model through all checks, in this process.

    Args:
        case: The model.
        wanted: What to bring it to.
        folder: An empty one, for the saved network.
        note: Told what is begun, with `macs_ratio` and `parity_max_rel` once they are known.

    Returns:
        The verdict. Errors that are not ours are not caught.
    """
    numbers: dict[str, float] = {}
    model: nn.Module | None = None
    planned: _Planned | None = None
    try:
        note("building it", numbers)
        model, shape = _network(case, wanted)
        images = _images(shape, wanted)
        note("running the dense network", numbers)
        before = count(model, images).macs
        with unchanged(model):
            reached = {training: _gradients(model, images, "dense", training) for training in (False, True)}
        note("planning", numbers)
        planned = _plan(model, images[:1], wanted)
        note("proving the plan", numbers)
        numbers["parity_max_rel"] = _prove(model, planned, images)
        note("cutting it", numbers)
        apply_plan(model, planned.plan, images, groups=planned.groups, check=False)
        ratio = numbers["macs_ratio"] = count(model, images).macs / before
        note("running the pruned network", numbers)
        for training, names in reached.items():
            _check_gradients(names - _gradients(model, images, "pruned", training), training)
        note("saving and loading it", numbers)
        _check_saved(model, images, shape, folder)
        if abs(ratio / wanted.macs - 1) > BUDGET_TOLERANCE:
            asked = f"asked for {wanted.macs:g} within {BUDGET_TOLERANCE:.0%}"
            raise _Wrong(f"{ratio:.4f} of the MACs are left, {asked}; {planned.left_whole or 'no group is left whole'}")
    except _Wrong as error:
        return Verdict("failed", one_line(error))
    except NNIPluginError as error:
        if planned is not None:  # too late for a refusal
            return Verdict("failed", one_line(f"{type(error).__name__}: {error}"))
        return _refusal(model, error)
    return Verdict("ok", one_line(planned.left_whole))


def _network(case: Case, wanted: Wanted) -> tuple[nn.Module, tuple[int, int, int]]:
    """Build a model with its library's own arguments; returns it in eval mode, and the shape of its images."""
    torch.manual_seed(wanted.seed)
    model = create_model(case.model, case.library, num_classes=None)  # type: ignore[arg-type]
    randomise(model, wanted.seed)
    return model.eval().to(usable_device(wanted.device)), usual_input(model, case.library, case.model)


def _images(shape: tuple[int, int, int], wanted: Wanted) -> Tensor:
    generator = torch.Generator().manual_seed(wanted.seed)
    return torch.randn(IMAGES, *shape, generator=generator).to(usable_device(wanted.device))


def _gradients(model: nn.Module, images: Tensor, which: str, training: bool) -> set[str]:
    """Return the names of the parameters that a backward pass gives finite gradients of their shape.

    Raises:
        _Wrong: An output is not finite.
    """
    model.train().train(training).zero_grad(set_to_none=True)  # going through train mode drops what a network caches
    outputs = [tensor for tensor in tensors_in(call(model, images)) if tensor.is_floating_point()]
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise _Wrong(f"an output of the {which} network is not finite in {_mode(training)} mode")
    # Weighted at random: the plain sum of what a softmax or a normalisation gives is constant.
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    torch.stack([(output * weight).mean() for output, weight in zip(outputs, weights, strict=True)]).sum().backward()
    reached = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
        and parameter.grad.shape == parameter.shape
        and bool(torch.isfinite(parameter.grad).all())
    }
    model.train().eval().zero_grad(set_to_none=True)
    return reached


def _plan(model: nn.Module, image: Tensor, wanted: Wanted) -> _Planned:
    """Plan by random scores.

    Raises:
        NNIPluginError: It cannot be done; for a budget out of reach the text says what must stay whole.
    """

    def no_loss(*_: object) -> Tensor:
        raise AssertionError("random scores need no loss")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            plan = plan_channels(model, image, Random(wanted.seed), (), no_loss, MACs(wanted.macs))
        except BudgetError as error:
            groups = find_groups(model, image)
            raise BudgetError(f"{_said_whole(said, groups)}. {error}".lstrip(". ")) from error
    return _Planned(plan, find_groups(model, image), _said_whole(said))


def _said_whole(said: Sequence[warnings.WarningMessage], groups: Sequence[ChannelGroup] = ()) -> str:
    """Name groups that stay whole: those found unsound, by what was warned of them, then those of a kind we keep."""
    found = [str(warning.message) for warning in said if "is left whole" in str(warning.message)]
    # The classifier's is in every network, and says nothing.
    fixed = [group for group in groups if group.fixed and "the network's output" not in group.fixed]
    found += [f"Group {group.name!r} is left whole: {group.fixed}" for group in fixed]
    more = f"; and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return "; ".join(text.rstrip(".") for text in found[:_MOST_NAMED]) + more


def _prove(model: nn.Module, planned: _Planned, images: Tensor) -> float:
    """Compare masked and compact; returns the largest relative difference.

    Random weights can blow rounding up, through a softmax over huge values: what differs in float32 is judged again in
    float64, where a wrong index differs as much as before.

    Raises:
        _Wrong: They differ by more than is accepted.
    """
    parity = verify(model, planned.plan, images, groups=planned.groups)
    if not parity.ok and images.dtype == torch.float32:
        parity = verify(copy.deepcopy(model).double(), planned.plan, images.double(), groups=planned.groups)
    if not parity.ok:
        raise _Wrong(str(parity))
    return parity.max_rel


def _check_gradients(missing: set[str], training: bool) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        where = f"in {_mode(training)} mode, where the dense network has one"
        raise _Wrong(f"no finite gradient of {min(missing)!r}{more} {where}")


def _mode(training: bool) -> str:
    return "train" if training else "eval"


@torch.no_grad()
def _check_saved(model: nn.Module, images: Tensor, shape: Sequence[int], folder: Path) -> None:
    """Save a network and load it.

    Raises:
        _Wrong: The loaded one has other tensors or gives other outputs.
    """
    save_pretrained(model, folder, example_input_shape=shape)
    loaded = from_pretrained(folder, device=images.device)
    ours, theirs = model.state_dict(), loaded.state_dict()
    other = [name for name in {**ours, **theirs} if not _same(ours.get(name), theirs.get(name))]
    if other:
        raise _Wrong(f"tensor {other[0]!r} is another one once saved and loaded")
    pairs = zip(tensors_in(call(model, images)), tensors_in(call(loaded, images)), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise _Wrong("the outputs are not the same bit by bit once saved and loaded")


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _refusal(model: nn.Module | None, error: NNIPluginError) -> Verdict:
    """Accept an error as a refusal when it names the module at fault, or says that the model itself does not run."""
    known: set[str] = set()
    if model is not None:
        known = {name for name, _ in (*model.named_modules(), *model.named_parameters())} - {""}
    # Names in quotation marks, or written as no word of a sentence is: a module may well be called `head`.
    written = re.findall(r"'([^']+)'|(\w+(?:\.\w+)+|\w*[_\d]\w*)", str(error))
    if isinstance(error, ModelError) or any(name in known for pair in written for name in pair):
        return Verdict("refused", one_line(error))
    return Verdict("failed", one_line(f"refused without naming a module: {error}"))
