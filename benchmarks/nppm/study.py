"""What the NPPM experiments share: searches, watched as they go, and what their networks are worth once fine-tuned.

Each search and each fine-tuning is a run of its own in a grid; a search that is killed goes on from its last point.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.training import evaluate
from nni_plugin.adapters.training.checkpoint import read_checkpoint, write_checkpoint
from nni_plugin.benchmarks.experiment import Experiment
from nni_plugin.benchmarks.nppm.presets import Numbers
from nni_plugin.budgets import MACs
from nni_plugin.cost import count
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import DataError
from nni_plugin.machine import usable_device
from nni_plugin.methods import create_criterion
from nni_plugin.performance import PerformancePlanner, SearchOptions, predictor_quality
from nni_plugin.performance.architecture import ArchitectureLayout
from nni_plugin.performance.gates import EVEN
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import plan_channels, unchanged
from nni_plugin.search_plans import SEARCHES, summary

DENSE_ALIKE = "dense"
"""The method that removes nothing, and is fine-tuned like the others."""

Batches = list[tuple[Tensor, Tensor]]


class Study(Experiment):
    """One network: its searches, and what becomes of what they find.

    Args:
        numbers: The numbers; of the dense networks' training only `base`, for they see all training images.
        folder: For the runs.
        dense: For the dense networks.
        network: Of `presets.DENSE`.
        data_dir: Folder of the data; None for the usual place, where there is one.
        device: "cpu", "cuda" ...; None takes the best there is.
    """

    def __init__(
        self,
        numbers: Numbers,
        folder: Path,
        dense: Path,
        network: str,
        *,
        data_dir: Path | None = None,
        device: str | None = None,
    ) -> None:
        self.place = usable_device(device)
        super().__init__(numbers, folder, data_dir=data_dir, device=str(self.place), network=network)
        self.numbers = numbers
        whole = replace(numbers, images=None)
        self.dense = Experiment(whole, dense, data_dir=data_dir, device=str(self.place), network=network)
        self._images: tuple[int, dict[str, Batches]] | None = None

    def base(self, seed: int) -> dict[str, Any]:
        """Train and save the dense network of a seed, unless it is there; return its record."""
        return self.dense.base(seed)

    def saved(self, seed: int) -> Path:
        """Return the folder of the dense network of a seed."""
        return self.dense.saved(seed)

    # -- runs ---------------------------------------------------------------------------------------------

    def search(self, method: str, seed: int) -> dict[str, Any]:
        """Search, on the dense network of a seed.

        Returns:
            The record: `plan` as JSON, `p`, the `choice` and its accuracies, the `curve`, the `summary` of the last
            tenth of the steps, `quality` of the performance network by kind of architecture, `seconds` in all.
        """
        options = self.options(method, seed)
        settings = {"options": asdict(options), **self._seen(), "curve_images": self.numbers.curve_images}
        settings |= {"points": self.numbers.points, "judged": self.numbers.judged}
        return self.grid.run(
            self.name_of("search", method, seed), lambda state: self._search(options, seed, state), settings
        )

    def tuned(self, method: str, seed: int) -> dict[str, Any]:
        """Prune the dense network of a seed by a method and fine-tune it.

        Returns:
            The record: `top1` in percent, `top1_before`, `macs_ratio`, `widths`, costs, `history` and `seconds`.
        """
        settings = {"finetune": asdict(self.numbers.finetune), "method": method, **self._seen()}
        if is_search(method):
            settings["options"] = asdict(self.options(method, seed))
        return self.grid.run(
            self.name_of("tuned", method, seed), lambda state: self._tune(method, seed, state), settings
        )

    def name_of(self, kind: str, method: str, seed: int) -> str:
        """Return the name of a run in the grid."""
        return f"{kind}/seed{seed}/{method.replace(':', '_')}"

    def options(self, method: str, seed: int) -> SearchOptions:
        """Return how the search of a method goes."""
        name, _, selected = method.partition(":")
        select = "all" if selected == "all" else "no-skip"
        return SearchOptions(**{**self.numbers.search, "mode": SEARCHES[name], "seed": seed, "select": select})

    # -- parts --------------------------------------------------------------------------------------------

    def _seen(self) -> dict[str, Any]:
        """Return which images and what budget decide a plan."""
        numbers = self.numbers
        seen = {name: getattr(numbers, name) for name in ("search_images", "search_batch", "choice_images")}
        return {**seen, "macs": numbers.macs, "finetune_images": numbers.images}

    def _loaded(self, seed: int) -> tuple[nn.Module, dict[str, Batches]]:
        """Return the dense network, and the images to search on, to choose on and of the curves."""
        numbers, size = self.numbers, self.numbers.search_batch
        if self._images is None or self._images[0] != seed:
            data = self.dense.data(seed)
            train = _first(data.score, numbers.search_images + numbers.choice_images)
            parts = {
                "search": tuple(part[: numbers.search_images] for part in train),
                "choice": tuple(part[numbers.search_images :] for part in train),
                "curve": _first(data.test, numbers.curve_images),
            }
            cut = {
                name: list(zip(*(part.to(self.place).split(size) for part in pair), strict=True))
                for name, pair in parts.items()
            }
            cut["search"] = [batch for batch in cut["search"] if len(batch[1]) == size]  # all weigh the same
            self._images = seed, cut
        self.base(seed)
        return self.dense.trained_base(seed).eval().to(self.place), self._images[1]

    def _search(self, options: SearchOptions, seed: int, state: Path) -> dict[str, Any]:
        model, images = self._loaded(seed)
        examples, file = images["search"][0][0][:2], state / "search.pt"
        begun, before, curve = time.perf_counter(), 0.0, list[dict[str, Any]]()
        with unchanged(model):
            planner = PerformancePlanner(model, examples, cross_entropy, MACs(self.numbers.macs), options=options)
            search = planner.search
            if file.is_file():
                saved = read_checkpoint(file, {})
                search.load_state_dict(saved["search"])
                before, curve = saved["seconds"], saved["curve"]

            def look(_: Any = None) -> None:
                if search.steps_done == len(curve) * options.steps // self.numbers.points:
                    curve.append(_point(planner, images["curve"], len(curve) and curve[-1]["step"]))
                    seconds = before + time.perf_counter() - begun
                    content = {"search": search.state_dict(), "curve": curve, "seconds": seconds}
                    write_checkpoint(file, {}, content)

            look()
            search.run(images["search"], look)
            plan = planner.plan(images["choice"])
            assert planner.choice is not None
            quality = {}
            if search.learner is not None:
                kinds: dict[str, int | list[Tensor]] = {
                    "near": self.numbers.judged,
                    "wide": of_any_width(search.layout, self.numbers.judged, seed),
                }
                quality = {
                    kind: _plain(asdict(predictor_quality(search, images["choice"][:8], vectors)))
                    for kind, vectors in kinds.items()
                }
            pruned = evaluate(plan.apply(copy.deepcopy(model), examples), images["choice"], self.place)
        return {
            "plan": plan.to_json(),
            "p": search.target.p,
            "macs_ratio": plan.cost_after.macs / plan.cost_before.macs,  # type: ignore[union-attr]
            "choice": planner.choice.source,
            "choice_top1": 100 * float(planner.choice.accuracy or 0.0),
            "choice_top1_pruned": pruned["top1"],
            "compared": {name: 100 * value for name, value in planner.choice.compared.items()},
            "curve": curve,
            "summary": summary(search.history),
            "quality": quality,
            "seconds": before + time.perf_counter() - begun,
        }

    def _tune(self, method: str, seed: int, state: Path) -> dict[str, Any]:
        model, images = self._loaded(seed)
        examples = images["search"][0][0][:2]
        dense = count(model, examples)
        plan = self._plan(method, seed, model, images["search"])
        if plan is not None:
            plan.apply(model, examples)
        after_cut = evaluate(model, self.data(seed).test, self.place)["top1"]
        record = self._train(model.train(), replace(self.numbers.finetune, seed=seed), seed, state)
        return {
            **record,
            "top1_before": after_cut,
            "macs_ratio": record["macs"] / dense.macs,
            "params_ratio": record["params"] / dense.params,
            "widths": {} if plan is None else {name: len(kept) for name, kept in plan.kept().items()},
        }

    def _plan(self, method: str, seed: int, model: nn.Module, batches: Batches) -> PruningPlan | None:
        if method == DENSE_ALIKE:
            return None
        if is_search(method):
            return PruningPlan.from_json(self.search(method, seed)["plan"])
        name, selected = criterion_of(method)
        return plan_channels(
            model,
            batches[0][0][:2],
            create_criterion(name, seed),
            batches,
            cross_entropy,
            MACs(self.numbers.macs),
            select="all" if selected == "all" else "no-skip",
        )


def is_search(method: str) -> bool:
    """Tell whether a method searches over gates."""
    return method.partition(":")[0] in SEARCHES


def criterion_of(method: str) -> tuple[str, str]:
    """Return the name of a criterion, and `"all"` where a method ends in `:all`: residual groups may leave as well."""
    name = method.removesuffix(":all")
    return name, "" if name == method else "all"


def of_any_width(layout: ArchitectureLayout, number: int, seed: int) -> list[Tensor]:
    """Return architectures drawn without regard to the gates, each of another width between 0.3 and 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(number):
        rate = 0.3 + 0.7 * torch.rand((), generator=generator)
        uniform = torch.rand(layout.size, generator=generator)
        vector = (uniform < rate).float()
        for part in layout.slices.values():
            vector[part][uniform[part].argmin()] = 1  # no layer without channels
        drawn.append(vector.to(layout.device))
    return drawn


def _point(planner: PerformancePlanner, batches: Batches, last: int) -> dict[str, Any]:
    """Return where a search stands: its network as it is and within the budget, and means since the last point."""
    search, options = planner.search, planner.search.options
    logits = search.gates.logits.detach()
    opened = logits + options.offset >= EVEN
    for part in search.layout.slices.values():
        opened[part][logits[part].argmax()] = True
    as_it_is = opened.to(logits)
    repaired = search.layout.architecture(planner.discretiser.deterministic(logits, options.offset)).to(logits)
    with search.network, torch.no_grad():
        now, within = (search.network.evaluate(vector, batches) for vector in (as_it_is, repaired))
        cost = float(search.target.objective(as_it_is)) / search.target.objective.dense
    since = {} if search.steps_done == last else summary(search.history[last:], share=1)
    return {
        "step": search.steps_done,
        "loss": now[0],
        "top1": 100 * now[1],
        "macs_ratio": cost,
        "loss_within": within[0],
        "top1_within": 100 * within[1],
        "search": since,
    }


def _first(loader: Any, images: int) -> tuple[Tensor, Tensor]:
    parts: list[Sequence[Tensor]] = []
    seen = 0
    for batch in loader:
        parts.append(batch)
        seen += len(batch[1])
        if seen >= images:
            inputs, labels = (torch.cat(part)[:images] for part in zip(*parts, strict=True))
            return inputs, labels
    raise DataError(f"Expected {images} images, the data set has {seen}: ask for fewer.")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return numbers with None for those that are none, as JSON has it."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}
