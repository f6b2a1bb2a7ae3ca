"""Every criterion against the Oracle on one network: data, pretraining, measuring, scoring, correlating, writing.

All criteria and the Oracle see the same training images, in the same minibatches, on the network as it is used (eval
mode). Criteria are compared with the squared change of the loss (Molchanov et al., CVPR 2019, Eq. 3), on those images
and on others that neither training nor scoring has seen; criteria that predict the change itself are compared with it
once more, with its sign.

The Oracle is what takes long: its state is saved after every minibatch and the scores after every criterion, and a
run that is killed goes on from there.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from nni_plugin.adapters.torch_pruning import find_groups, sound_groups
from nni_plugin.adapters.training import evaluate
from nni_plugin.adapters.training.checkpoint import read_checkpoint, write_checkpoint
from nni_plugin.correlation_study.data import FirstImages, open_images
from nni_plugin.correlation_study.results import Measured, Scored, Scores, agreement, json_value, row_of, write_results
from nni_plugin.criteria import Criterion, Oracle
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import CriterionError, GraphError
from nni_plugin.groups import ChannelGroup
from nni_plugin.job_steps import pretrain
from nni_plugin.machine import describe_machine, library_versions, usable_device
from nni_plugin.methods import create_criterion, known_methods
from nni_plugin.network_job import NetworkJob, network_of
from nni_plugin.planner import score_groups, unchanged
from nni_plugin.workspace import Workspace, workspace

_HOST_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What stock importances raise on networks they cannot score."""


@dataclass(frozen=True)
class CorrelationJob(NetworkJob):
    """What to compare, on what; the fields are those of :class:`NetworkJob` and these.

    Args:
        methods: Criteria to compare, see `methods.known_methods`; None takes all whose library is installed.
        images: Training images that the criteria and the Oracle see, at least 1.
        held_out_images: Images kept away from training and criteria, that the Oracle alone sees; 0 for none.
        held_out_from: Where those come from; `"test"` for a network that has seen all training images.
        channels_per_group: The Oracle judges at most so many channels of each group, drawn at random; None: all.
        ignore: Layers to leave whole, by name.
    """

    _: KW_ONLY
    methods: tuple[str, ...] | None = None
    images: int = 2000
    held_out_images: int = 1000
    held_out_from: Literal["train", "test"] = "train"
    channels_per_group: int | None = None
    ignore: tuple[str, ...] = ()

    def _values(self) -> dict[str, Any]:
        return {**super()._values(), "methods": self.chosen()}

    def chosen(self) -> tuple[str, ...]:
        """Return the criteria to compare, each once."""
        if self.methods is not None:
            return tuple(dict.fromkeys(self.methods))
        has_nni = find_spec("nni") is not None
        return tuple(name for name in known_methods() if has_nni or not name.startswith("nni:"))


def run_correlations(
    job: CorrelationJob, *, resume: bool = False, command: str = "", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Compare criteria with the Oracle, and write `correlations.csv`, `.json` and `.png`, and `oracle.csv`.

    Args:
        job: What to do.
        resume: Go on from the state that an interrupted run of the same job left in the output folder.
        command: The command that was run, for the record.
        say: Takes what a person should read, as it happens.

    Returns:
        The content of `correlations.json`.

    Raises:
        NNIPluginError: Anything the user can mend; nothing half-written is left in the output folder.
    """
    criteria = {method: create_criterion(method) for method in job.chosen()}
    if not criteria:
        raise CriterionError("No criterion was named; name some of those in nni_plugin.methods.known_methods().")
    with workspace(job.output, job.settings(), resume=resume) as places:
        return _Run(job, criteria, places, resume, say).run(command)


class _Run:
    """One run: its data, its network and where it writes."""

    def __init__(
        self,
        job: CorrelationJob,
        criteria: Mapping[str, Any],
        places: Workspace,
        resume: bool,
        say: Callable[[str], None],
    ) -> None:
        torch.manual_seed(job.seed)
        self.job, self.criteria, self.places, self.resume, self.say = job, criteria, places, resume, say
        self.splits = open_images(
            job.dataset,
            job.data_dir,
            images=job.images,
            held_out_images=job.held_out_images,
            held_out_from=job.held_out_from,
            seed=job.seed,
            **job.data_kwargs,
        )
        self.device = usable_device(job.device)
        self.model, self.examples = network_of(job, self.splits, self.device)
        self.groups = self._sound_groups()

    def run(self, command: str) -> dict[str, Any]:
        """Do the job and write its results."""
        job = self.job
        self.say(self.splits.describe())
        pretrain(self.model, self.splits, job.pretrain, self.device, self.places.state, resume=self.resume)
        self.model.eval()
        top1 = evaluate(self.model, self.splits.test, self.device)["top1"]
        channels = sum(group.width for group in self.groups)
        self.say(f"{job.model}: top-1 {top1:.2f} %, {channels} coupled channels in {len(self.groups)} groups")

        batches = self._batches(self.splits.score, job.images)
        train = self._oracle("oracle-train", batches)
        self.say(f"Oracle on {job.images} training images: {train.seconds:.1f} s")
        held_out = None
        if job.held_out_images:
            assert self.splits.held_out is not None
            held_out = self._oracle("oracle-held-out", self._batches(self.splits.held_out, job.held_out_images))
            self.say(f"Oracle on {job.held_out_images} held-out images: {held_out.seconds:.1f} s")
        scored = {method: self._scored(method, batches, train) for method in self.criteria}
        rows = {method: row_of(scored[method], train, held_out) for method in scored}
        if all(found.reason for found in scored.values()):
            raise CriterionError(f"No criterion could score {job.model}. " + next(iter(scored.values())).reason)
        for method, found in scored.items():
            if found.reason:
                warnings.warn(f"{method} is left out: {found.reason}", stacklevel=4)

        record = {
            "command": command,
            "settings": job.settings(),
            "network": {"top1": top1, "groups": len(self.groups), "channels": channels, "judged": train.judged},
            "data": {"name": self.splits.name, "fingerprint": self.splits.fingerprint},
            "minibatches": batches.sizes,
            "criteria": {
                method: {key: json_value(value) for key, value in row.items()} for method, row in rows.items()
            },
            "skipped": {method: found.reason for method, found in scored.items() if found.reason},
            "oracle": {
                "seconds": round(train.seconds, 3),
                "seconds_held_out": None if held_out is None else round(held_out.seconds, 3),
                "agreement_with_held_out": None if held_out is None else agreement(train, held_out),
            },
            "seed": job.seed,
            "versions": library_versions(("nni-plugin", "torch-pruning", "nni", "scipy", "numpy")),
            "machine": describe_machine(),
        }
        write_results(self.places.results, record, rows, scored, train, held_out)
        return record

    # -- steps --------------------------------------------------------------------------------------------

    def _sound_groups(self) -> list[ChannelGroup]:
        found = find_groups(self.model, self.examples, ignore=self.job.ignore)
        groups = sound_groups(self.model, found, self.examples)
        if all(group.fixed is not None for group in groups):
            reasons = "; ".join(f"{group.name}: {group.fixed}" for group in groups[:5])
            raise GraphError(f"Nothing in {self.job.model} may be pruned. {reasons}")
        return [group for group in groups if group.fixed is None]

    def _batches(self, loader: Any, number: int) -> FirstImages:
        return FirstImages(loader, self.device, number, int(loader.batch_size))

    def _oracle(self, name: str, batches: FirstImages) -> Measured:
        """Measure every channel, going on from the last minibatch that was saved."""
        path, seconds = self.places.state / f"{name}.pt", 0.0
        oracle = Oracle(cross_entropy, channels_per_group=self.job.channels_per_group, seed=self.job.seed)
        if self.resume and path.exists():
            saved = read_checkpoint(path, {})
            oracle.load_state_dict(saved["oracle"])
            seconds = saved["seconds"]
        done = oracle.minibatches
        with unchanged(self.model):
            self.model.eval()
            with oracle.collect(self.model, self.groups):
                for number, batch in enumerate(batches):
                    if number < done:
                        continue
                    begun = time.perf_counter()
                    oracle.update(batch)
                    seconds += time.perf_counter() - begun
                    write_checkpoint(path, {}, {"oracle": oracle.state_dict(), "seconds": seconds})
        return Measured({group.name: oracle.loss_changes(group) for group in self.groups}, seconds)

    def _scored(self, method: str, batches: FirstImages, oracle: Measured) -> Scored:
        """Score by one criterion, or read back what was scored before the run was interrupted."""
        path = self.places.state / f"scores-{method.replace(':', '-')}.pt"
        if self.resume and path.exists():
            return Scored(**read_checkpoint(path, {}))
        criterion = self.criteria[method]
        if isinstance(criterion, Oracle) and not criterion.signed:
            found = Scored(oracle.squares, {}, oracle.seconds, "")
        else:
            found = self._score(criterion, batches)
        write_checkpoint(path, {}, {key: getattr(found, key) for key in Scored.__dataclass_fields__})
        spent = f"{found.seconds:.1f} s" if not found.reason else f"left out: {found.reason}"
        self.say(f"{method}: {spent}")
        return found

    def _score(self, criterion: Any, batches: FirstImages) -> Scored:
        foreign = not isinstance(criterion, Criterion)
        # A graph of its own for each: stock importances sort the indices of the groups they are given.
        groups = self._with_host() if foreign else self.groups
        torch.manual_seed(self.job.seed)
        begun = time.perf_counter()
        try:
            scores = score_groups(self.model, groups, criterion, batches, cross_entropy)
        except CriterionError as error:
            return Scored({}, {}, 0.0, str(error))
        except torch.OutOfMemoryError:
            raise
        except _HOST_ERRORS as error:
            if not foreign:
                raise
            return Scored({}, {}, 0.0, f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - begun
        infinite = [name for name, score in scores.items() if not bool(torch.isfinite(score).all())]
        if infinite:
            return Scored({}, {}, 0.0, f"scores of group {infinite[0]!r} are not finite")
        return Scored(scores, _predictions(criterion, groups), seconds, "")

    def _with_host(self) -> list[ChannelGroup]:
        names = {group.name for group in self.groups}
        found = find_groups(self.model, self.examples, ignore=self.job.ignore, keep_host=True)
        return [group for group in found if group.name in names]


def _predictions(criterion: Any, groups: Sequence[ChannelGroup]) -> Scores:
    """Return the loss changes that a criterion predicts, with their sign; empty if it predicts none."""
    predict = getattr(criterion, "loss_changes", None)
    if predict is None or not groups or predict(groups[0]) is None:
        return {}
    return {group.name: predict(group).double() for group in groups}
