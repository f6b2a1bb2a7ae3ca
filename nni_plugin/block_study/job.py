"""Everything about the removable blocks of one network: data, pretraining, latency, importance, what each one costs.

All importances see the same training images on the network as it is used (eval mode); what must be measured on others
(Imprinting's accuracies, the loss without a block) is measured on training images held out, never on the test set. The
state is saved after every step, and a run that is killed goes on from there.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from nni_plugin.adapters.data import create_loaders
from nni_plugin.adapters.training import evaluate
from nni_plugin.adapters.training.checkpoint import read_checkpoint, write_checkpoint
from nni_plugin.adapters.training.evaluate import show_progress
from nni_plugin.block_study.results import agreements, rows_of, write_results
from nni_plugin.block_study.scores import BlockScores, score_blocks
from nni_plugin.block_study.without import Absence, Absences, costs_saved
from nni_plugin.correlation_study.data import FirstImages
from nni_plugin.cost import count
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import CriterionError, DataError
from nni_plugin.job_steps import pretrain
from nni_plugin.layers import LayerImportance
from nni_plugin.layers.blocks import find_blocks
from nni_plugin.layers.candidates import Candidates, candidate_blocks
from nni_plugin.layers.latency import BlockLatency, block_latencies
from nni_plugin.layers.methods import create_layer_importance
from nni_plugin.machine import describe_machine, library_versions, usable_device
from nni_plugin.network_job import NetworkJob, network_of
from nni_plugin.workspace import Workspace, workspace

CRITERIA = (
    "imprinting",
    "layer-taylor-fo-weight", "layer-magnitude", "layer-feature-map", "layer-taylor-fo", "layer-bn-scale",
    "layer-ensemble", "block-gate",
)  # fmt: skip
"""Those of the paper, and gates on whole blocks."""

STATISTICS_BATCHES = 10
"""Minibatches on which statistics of batch normalisations are estimated anew."""


@dataclass(frozen=True)
class LayersJob(NetworkJob):
    """What to look at; the fields are those of :class:`NetworkJob` and these.

    Args:
        criteria: Layer importances, see `layers.methods.LAYER_METHODS`.
        candidates: Of blocks inside blocks the `"outermost"`, the `"innermost"` or `"all"`.
        score_batches: Minibatches that importances see; None takes all training data that are not held out, once.
        held_out: Share of the training images held out, in (0, 1).
        removal_images: Held-out images on which the network is measured without each block; 0 for none.
        latency_batch_sizes: Batch sizes to measure the latency at.
    """

    _: KW_ONLY
    criteria: tuple[str, ...] = CRITERIA
    candidates: Candidates = "outermost"
    score_batches: int | None = None
    held_out: float = 0.1
    removal_images: int = 1000
    latency_batch_sizes: tuple[int, ...] = (1, 64)


def run_layers(
    job: LayersJob, *, resume: bool = False, command: str = "", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure every removable block, and write `layers.csv`, `layers.json`, `importance.png` and `latency.png`.

    Args:
        job: What to do.
        resume: Go on from the state that an interrupted run of the same job left in the output folder.
        command: The command that was run, for the record.
        say: Takes what a person should read, as it happens.

    Returns:
        The content of `layers.json`.

    Raises:
        NNIPluginError: Anything the user can mend; nothing half-written is left in the output folder.
    """
    importances = {name: create_layer_importance(name, job.seed) for name in job.criteria}
    if not importances:
        raise CriterionError("No criterion was named; name some of those in nni_plugin.layers.methods.LAYER_METHODS.")
    if not 0 < job.held_out < 1:
        raise DataError(f"held_out={job.held_out} must be a share of the training images, above 0 and below 1.")
    with workspace(job.output, job.settings(), resume=resume) as places:
        return _Run(job, importances, places, resume, say).run(command)


class _Run:
    """One run: its data, its network and where it writes."""

    def __init__(
        self,
        job: LayersJob,
        importances: Mapping[str, LayerImportance],
        places: Workspace,
        resume: bool,
        say: Callable[[str], None],
    ) -> None:
        torch.manual_seed(job.seed)
        self.job, self.importances, self.places, self.resume, self.say = job, importances, places, resume, say
        self.splits = create_loaders(
            job.dataset, job.data_dir, seed=job.seed, train_fraction_held_out=job.held_out, **job.data_kwargs
        )
        if self.splits.held_out is None:
            raise DataError(f"held_out={job.held_out} holds out no image of {self.splits.name!r}; take a larger share.")
        self.held_out = self.splits.held_out
        self.device = usable_device(job.device)
        self.model, self.examples = network_of(job, self.splits, self.device)
        self.found = find_blocks(self.model, self.examples)
        self.blocks = candidate_blocks(self.model, self.examples, job.candidates)

    def run(self, command: str) -> dict[str, Any]:
        """Do the job and write its results."""
        job = self.job
        self.say(self.splits.describe())
        pretrain(self.model, self.splits, job.pretrain, self.device, self.places.state, resume=self.resume)
        self.model.eval()
        top1 = evaluate(self.model, self.splits.test, self.device)["top1"]
        self.say(f"{job.model}: top-1 {top1:.2f} %, {len(self.blocks)} blocks that can be removed")

        saved = costs_saved(self.model, self.examples, self.blocks, self.found.records)
        scored = self._scored()
        if all(found.reason for found in scored.values()):
            raise CriterionError(f"No criterion could score {job.model}. " + next(iter(scored.values())).reason)
        for name, found in scored.items():
            if found.reason:
                warnings.warn(f"{name} is left out: {found.reason}", stacklevel=4)
        whole, absences = self._absences()
        latencies = {size: self._latencies(size) for size in job.latency_batch_sizes}

        rows = rows_of(self.blocks, saved, latencies, absences, scored)
        cost = count(self.model, self.examples)
        record = {
            "command": command,
            "settings": job.settings(),
            "network": {
                "top1": top1,
                "macs": cost.macs,
                "params": cost.params,
                "latency": {str(size): asdict(found[""]) for size, found in latencies.items()},
                "held_out": whole,
            },
            "data": {"name": self.splits.name, "fingerprint": self.splits.fingerprint},
            "minibatches": self._minibatches(self.job.score_batches).sizes,
            "blocks": rows,
            "staying": {block.name: block.fixed for block in self.found.blocks if block.fixed is not None},
            "criteria": {
                name: {"seconds": round(found.seconds, 3), **found.details}
                for name, found in scored.items()
                if not found.reason
            },
            "skipped": {name: found.reason for name, found in scored.items() if found.reason},
            "spearman": agreements(scored, absences),
            "seed": job.seed,
            "versions": library_versions(),
            "machine": describe_machine(),
        }
        write_results(self.places.results, record, rows, [name for name, found in scored.items() if found.scores])
        return record

    # -- steps --------------------------------------------------------------------------------------------

    def _minibatches(self, number: int | None) -> FirstImages:
        """Return the first minibatches to score on, all for None."""
        loader, size = self.splits.score, int(self.splits.score.batch_size or 1)
        there = len(loader) if number is None else min(number, len(loader))
        return FirstImages(loader, self.device, there * size, size)

    def _latencies(self, batch_size: int) -> dict[str, BlockLatency]:
        """Measure the latency of every block and the network, or read back what was measured."""
        path = self.places.state / f"latency-{batch_size}.pt"
        if self.resume and path.exists():
            return {name: BlockLatency(**values) for name, values in read_checkpoint(path, {}).items()}
        found = block_latencies(self.model, self.examples, self.blocks, batch_size=batch_size)
        write_checkpoint(path, {}, {name: asdict(latency) for name, latency in found.items()})
        whole = found[""]
        self.say(
            f"latency at batch size {batch_size}: {whole.median_ms:.4g} ms ({whole.device}, {whole.threads} threads)"
        )
        return found

    def _scored(self) -> dict[str, BlockScores]:
        """Score by every criterion, those excepted that had scored before the run was interrupted."""
        paths = {name: self.places.state / f"scores-{name.replace(':', '-')}.pt" for name in self.importances}
        found = {}
        if self.resume:
            found = {name: BlockScores(**read_checkpoint(path, {})) for name, path in paths.items() if path.exists()}
        rest = {name: importance for name, importance in self.importances.items() if name not in found}
        scoring = score_blocks(
            rest,
            self.model,
            self.examples,
            self.blocks,
            self._minibatches(self.job.score_batches),
            cross_entropy,
            self.held_out,
            seed=self.job.seed,
        )
        for name, scores in scoring:
            found[name] = scores
            write_checkpoint(paths[name], {}, asdict(scores))
            spent = f"{scores.seconds:.1f} s" if not scores.reason else f"left out: {scores.reason}"
            self.say(f"{name}: {spent}")
        return {name: found[name] for name in self.importances}

    def _absences(self) -> tuple[dict[str, float] | None, dict[str, Absence]]:
        """Measure the network without each block, going on from the last one that was saved."""
        if not self.job.removal_images:
            return None, {}
        path, found, seconds = self.places.state / "absences.pt", {}, 0.0
        if self.resume and path.exists():
            saved = read_checkpoint(path, {})
            found = {name: Absence(**values) for name, values in saved["blocks"].items()}
            seconds = saved["seconds"]
        images, number = self._drawn(self.job.removal_images)
        absences = Absences(self.model, self.found.records, images, self._minibatches(STATISTICS_BATCHES))
        rest = [block for block in self.blocks if block.name not in found]
        for block in tqdm(rest, desc="without each block", leave=False, disable=not show_progress(None)):
            begun = time.perf_counter()
            found[block.name] = absences.of(block)
            seconds += time.perf_counter() - begun
            blocks = {name: asdict(absence) for name, absence in found.items()}
            write_checkpoint(path, {}, {"blocks": blocks, "seconds": seconds})
        self.say(f"the network without each block, on {number} held-out images: {seconds:.1f} s")
        return {**absences.whole, "images": number}, found

    def _drawn(self, number: int) -> tuple[DataLoader[Any], int]:
        """Return held-out images drawn by the seed, for they may lie in the order of classes, and their number."""
        source = self.held_out
        total = len(source.dataset)  # type: ignore[arg-type]
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(self.job.seed))[:number].tolist()
        loader = DataLoader(source.dataset, source.batch_size, sampler=drawn, collate_fn=source.collate_fn)
        return loader, len(drawn)
