"""Do one cell: the dense network of its seed, pruned by its method, fine-tuned and measured.

Our methods run as `nni-plugin prune` runs them. Built-in ones run through their own library's pruner, and what that
gives is fine-tuned and measured in the same way.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from nni_plugin.adapters.data import create_loaders
from nni_plugin.adapters.host_task import HostPruned
from nni_plugin.adapters.hosts import criterion_of, is_built_in, through_host
from nni_plugin.adapters.training import evaluate, fit
from nni_plugin.budgets import Budget, Latency, MACs
from nni_plugin.checkpoint import save_pretrained
from nni_plugin.comparison.job import DENSE, Cell, ComparisonJob
from nni_plugin.comparison.latency_target import macs_at_latency
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.job import Job
from nni_plugin.job_plans import check_job, method_of
from nni_plugin.job_steps import FirstBatches, before_and_after, pretrain
from nni_plugin.machine import describe_machine, usable_device
from nni_plugin.network_job import network_of
from nni_plugin.workflow import run_job
from nni_plugin.workspace import STATE, workspace, write_file


def do_cell(wanted: ComparisonJob, cell: Cell, say: Callable[[str], None]) -> dict[str, Any]:
    """Do a cell, going on where an interrupted process left it.

    Args:
        wanted: The comparison.
        cell: Which of its cells.
        say: Takes what a person should read.

    Returns:
        The content of `metrics.json`.

    Raises:
        NNIPluginError: The method refuses this network or target.
    """
    dense = dense_network(wanted, cell.seed, say)
    job = wanted.job_of(cell, dense.weights)
    finished = job.output / "metrics.json"
    if finished.is_file() and not (job.output / STATE).exists():
        metrics: dict[str, Any] = json.loads(finished.read_text())
        return metrics
    if is_built_in(job.method):
        return _run_built_in(job, dense.top1)
    return run_job(job, resume=True, command=f"one cell of a comparison: {cell.name}", say=_nothing).metrics


@dataclass(frozen=True)
class Dense:
    """A dense network's weights, and its accuracy on the test images in percent."""

    weights: Path
    top1: float


def dense_network(wanted: ComparisonJob, seed: int, say: Callable[[str], None]) -> Dense:
    """Return a seed's dense network; the first to ask trains it, whoever asks meanwhile waits."""
    folder = wanted.output / DENSE / f"seed{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "config.json").is_file():
            top1 = float(json.loads((folder / "config.json").read_text())["extra"]["top1"])
            return Dense(folder / "model.safetensors", top1)
        job = wanted.dense_job(seed)
        torch.manual_seed(seed)
        device = usable_device(job.device)
        splits = create_loaders(job.dataset, job.data_dir, seed=seed, **job.data_kwargs)
        model, _ = network_of(job, splits, device)
        state = folder / STATE
        pretrain(model, splits, job.pretrain, device, state, resume=True)
        top1 = evaluate(model, splits.test, device)["top1"]
        say(f"dense network, seed {seed}: top-1 {top1:.2f} %")
        keep_dense(wanted, seed, model, top1, splits.input_shape)
        shutil.rmtree(state, ignore_errors=True)
    return Dense(folder / "model.safetensors", top1)


def keep_dense(wanted: ComparisonJob, seed: int, model: nn.Module, top1: float, input_shape: Sequence[int]) -> None:
    """Let a seed start from a dense network of the caller's own.

    Args:
        wanted: The comparison.
        seed: Whose network it is.
        model: The network, of the template's model.
        top1: Its accuracy on the test images, in percent.
        input_shape: Channels, height and width of an image.
    """
    folder = wanted.output / DENSE / f"seed{seed}"
    save_pretrained(model, folder, example_input_shape=list(input_shape), extra={"top1": top1})


def _run_built_in(job: Job, dense_top1: float) -> dict[str, Any]:
    with workspace(job.output, job.settings(), resume=True) as places:
        torch.manual_seed(job.seed)
        splits = create_loaders(job.dataset, job.data_dir, seed=job.seed, **job.data_kwargs)
        device = usable_device(job.device)
        dense, examples = network_of(job, splits, device)
        if not isinstance(job.budget, Latency):  # whose check times every layer, for a planner that is not asked here
            scored = replace(job, method=criterion_of(job.method))
            check_job(scored, method_of(scored), dense, examples)
        begun = time.perf_counter()
        torch.manual_seed(job.seed)
        batches = FirstBatches(splits.score, device, job.score_batches)

        def prune(budget: Budget) -> HostPruned:
            return through_host(
                dense, examples, job.method, budget, batches, cross_entropy, ignore=job.ignore, seed=job.seed
            )

        if isinstance(job.budget, Latency):
            # A resumed cell must go on with the network it had: measured again, the latency may lead to another.
            found = places.state / "macs.json"
            if not found.is_file():
                ratio = macs_at_latency(prune, dense, job.budget, splits.input_shape, device)
                write_file(found, json.dumps(ratio))
            pruned = prune(MACs(json.loads(found.read_text())))
        else:
            pruned = prune(job.budget)
        if job.reestimate:
            reestimate_batchnorm(pruned.model, batches, cross_entropy)
        seconds = time.perf_counter() - begun
        after_cut = evaluate(pruned.model, splits.test, device)["top1"]
        history = fit(pruned.model, splits, job.finetune, checkpoint_dir=places.state, resume=True, device=device)
        metrics = {
            "method": job.method,
            "model": job.model,
            "library": job.library,
            "dataset": splits.name,
            "data_fingerprint": splits.fingerprint,
            "seed": job.seed,
            **before_and_after(dense, dense_top1, pruned.model, splits, device, job.latency_batch_sizes),
            "top1_before_finetune": after_cut,
            "host": pruned.settings,
            "seconds": {"prune": round(seconds, 3), "finetune": round(sum(row["seconds"] for row in history), 3)},
            "machine": describe_machine(),
        }
        write_file(places.results / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return metrics


def _nothing(text: str) -> None:
    """Say nothing: a cell's own report holds what `prune` would print."""
