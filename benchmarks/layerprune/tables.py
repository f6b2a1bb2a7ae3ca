"""The runs behind each table and figure of LayerPrune (Elkerdawy et al., ACCV 2020, supplement), row by row.

A row is its labels and what gives the rest of it; nothing is run before that is called.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nni_plugin.benchmarks.layerprune.study import Study
from nni_plugin.benchmarks.resnet20_table4 import all_but_first_layers
from nni_plugin.budgets import Channels, Latency, Layers
from nni_plugin.checkpoint import from_pretrained, save_pretrained
from nni_plugin.layers import rank_agreement, removal_order
from nni_plugin.layers.candidates import candidate_blocks
from nni_plugin.layers.methods import LAYER_METHODS
from nni_plugin.networks import NETWORKS
from nni_plugin.plan import PruningPlan
from nni_plugin.renumbering import Renumbering
from nni_plugin.schedules import Gradual, Iterative, OneShot

Row = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""Labels of a row, and what runs (or reads) its numbers."""

FILTER_CRITERIA = ("magnitude", "feature-map", "taylor-fo", "bn-scale", "geometric-median")
"""Table 1: weight norm, feature maps, Taylor, batch normalisation, median."""

OF_TABLE_3 = ("magnitude", "taylor-fo", "bn-scale")
"""Criteria for Table 3. ECC trains towards a budget, and slimming with a penalty: neither scores a trained network."""

KEPT_OF_TABLE_3 = {"vgg19_bn": 5004}
"""Channels that stay where the paper removes 500."""

STEPS = 5
"""Steps of fresh scores to a latency, without training between."""

_SHARE_OF_A_STEP = 0.1


def control(study: Study, seed: int) -> Iterator[Row]:
    """The dense network, fine-tuned as if something had been removed."""

    def whole() -> dict[str, Any]:
        return {"top1_dense": study.base(seed)["top1"], **_outcome(study, seed, PruningPlan(()))}

    yield {}, whole


def table1(study: Study, seed: int, shares: Sequence[float]) -> Iterator[Row]:
    """Filters by several criteria, in one step before fine-tuning, or iteratively in its course."""
    ignore = _between_convolutions(study.network)

    def at_once(method: str, share: float) -> dict[str, Any]:
        budget = Channels(round(1 - share, 6))
        record = study.plan(f"t1-{method}-{share:g}", method, seed, budget, OneShot(), ignore=ignore)
        return _planned(study, seed, record)

    def stepwise(method: str, share: float) -> dict[str, Any]:
        steps = max(1, round(share / _SHARE_OF_A_STEP))
        schedule = Gradual(steps, minibatches=study.preset.every, momentum=0.9)
        name = f"t1/seed{seed}/{method}-{share:g}"
        return _in_training(study.prune(name, seed, method, round(1 - share, 6), schedule, ignore=ignore))

    for share in shares:
        for method in FILTER_CRITERIA:
            for way, do in (("one-shot", at_once), ("iterative", stepwise)):
                yield {"method": method, "share": share, "way": way}, partial(do, method, share)


def table2(study: Study, seed: int, most: int) -> Iterator[Row]:
    """Blocks by Imprinting: ranked once, ranked anew after each removal, and with fine-tuning between as well."""

    def agreement(scores: Mapping[str, float]) -> dict[str, float | None]:
        found = rank_agreement(study.scores("imprinting", seed), scores)
        return {"spearman": None if math.isnan(found) else found}

    def at_once(n: int) -> dict[str, Any]:
        return _planned(study, seed, layer_prune(study, seed, n))

    def again(n: int) -> dict[str, Any]:
        found = rescored(study, seed, most)
        plan = PruningPlan((), tuple(found["blocks"][:n]))
        return {**agreement(found["scores"][n]), **_outcome(study, seed, plan)}

    def trained_between(n: int) -> dict[str, Any]:
        found = iterative(study, seed, n)
        outcome = _outcome(study, seed, PruningPlan((), tuple(found["blocks"])))
        return {**agreement(found["scores"]), "top1_between": found["top1"], **outcome}

    for n in range(1, most + 1):
        for way, do in (("one-shot", at_once), ("re-scored", again), ("iterative", trained_between)):
            yield {"n": n, "way": way}, partial(do, n)


def table3(study: Study, seed: int, layers: Sequence[int], batch_size: int) -> Iterator[Row]:
    """Layers by Imprinting, filters at the same latency, and as many filters as the paper removes."""

    def whole(n: int) -> dict[str, Any]:
        return _planned(study, seed, layer_prune(study, seed, n))

    def as_fast(method: str, n: int) -> dict[str, Any]:
        reached = min(1.0, round(whole(n)["latency"][str(batch_size)]["ratio"], 4))
        name = f"{method}-as-layers{n}-batch{batch_size}"
        record = study.plan(name, method, seed, Latency(reached, batch_size=batch_size), Gradual(STEPS))
        return _planned(study, seed, record)

    def as_many(method: str, left: int) -> dict[str, Any]:
        schedule = Iterative(study.preset.channels, study.preset.every)
        record = study.prune(f"t3/seed{seed}/{method}-{left}", seed, method, left, schedule)
        return {**_in_training(record), "architecture": architecture(study.network, (), record["widths"])}

    for n in layers:
        yield {"method": f"LayerPrune_{n}", "goal": f"{n} layers"}, partial(whole, n)
        for method in OF_TABLE_3:
            yield {"method": method, "goal": f"latency of LayerPrune_{n}"}, partial(as_fast, method, n)
    if study.network in KEPT_OF_TABLE_3:
        left = KEPT_OF_TABLE_3[study.network]
        for method in OF_TABLE_3:
            yield {"method": method, "goal": f"{left} filters left"}, partial(as_many, method, left)


def table5(study: Study, seed: int, layers: Sequence[int]) -> Iterator[Row]:
    """The network without its least important blocks: fine-tuned, and trained from fresh weights."""

    def both(n: int) -> dict[str, Any]:
        record = layer_prune(study, seed, n)
        outcome = _planned(study, seed, record)
        return {**outcome, "top1_scratch": study.from_scratch(_plan_of(record), seed)["top1"]}

    for n in layers:
        yield {"n": n}, partial(both, n)


def figure1(
    study: Study, seed: int, methods: Sequence[str], latency: Sequence[float], batch_size: int
) -> Iterator[Row]:
    """Filters and layers by several methods to several latencies."""

    def to_latency(method: str, ratio: float) -> dict[str, Any]:
        schedule = None if method in LAYER_METHODS else Gradual(STEPS)
        name = f"{method}-latency{ratio:g}-batch{batch_size}".replace(":", "_")
        record = study.plan(name, method, seed, Latency(ratio, batch_size=batch_size), schedule)
        return _planned(study, seed, record)

    for ratio in latency:
        for method in methods:
            yield {"method": method, "asked": ratio}, partial(to_latency, method, ratio)


# -- what several of them need ----------------------------------------------------------------------------


def layer_prune(study: Study, seed: int, n: int) -> dict[str, Any]:
    """Plan LayerPrune_n: the `n` blocks of least importance by Imprinting, ranked once."""
    return study.plan(f"imprinting-layers{n}", "imprinting", seed, Layers(n))


def rescored(study: Study, seed: int, most: int) -> dict[str, Any]:
    """Remove one block after the other, ranked anew each time without training between.

    Returns:
        `blocks` in the order in which they left, and `scores` after 0, 1, ... `most` removals.
    """
    # One step more than needed: its scores are those after the last removal that counts.
    name, steps = f"imprinting-rescored{most}", most + 1
    plan = _plan_of(study.plan(name, "imprinting", seed, Layers(steps), Gradual(steps)))
    scores: list[dict[str, float]] = [{} for _ in range(steps)]
    for row in plan.provenance["blocks"]:
        scores[row["step"]][row["name"]] = row["score"]
    return {"blocks": list(plan.removed_blocks[:most]), "scores": scores}


def iterative(study: Study, seed: int, n: int) -> dict[str, Any]:
    """Remove the n-th block as the authors do: the network without `n - 1` has been fine-tuned and ranked anew.

    Returns:
        `blocks` that have left, `top1_before` and `top1` of this step's fine-tuning, and `scores` of what is left, by
        the names of the dense network.
    """
    config = replace(study.preset.finetune, seed=seed)
    earlier = study.scores("imprinting", seed) if n == 1 else iterative(study, seed, n - 1)["scores"]

    def place(step: int) -> Path:
        return study.folder / "networks" / f"iterative-seed{seed}-{step}"

    def work(state: Path) -> dict[str, Any]:
        images = study.images(seed)
        model = study.network_of(seed) if n == 1 else from_pretrained(place(n - 1)).to(study.place)
        names, leaves = _dense_names(model), removal_order(earlier)[0]
        found = candidate_blocks(model, images.example)
        block = next(block.name for block in found if names.block_before(block.name) == leaves)
        PruningPlan((), (block,)).apply(model, images.example)
        before = study.settled_top1(model, seed)
        record = study.train(model, seed, state)
        save_pretrained(model, place(n), example_input_shape=images.shape)
        names = _dense_names(model)
        scores = study.score(model.eval(), "imprinting", seed)
        plan: PruningPlan = model.pruning_plan  # type: ignore[assignment]
        return {
            "blocks": list(plan.removed_blocks),
            "top1_before": before,
            "scores": {names.block_before(name): score for name, score in scores.items()},
            **record,
        }

    return study.grid.run(f"iterative/seed{seed}/{n}", work, {"finetune": asdict(config), **study.seen()})


def architecture(network: str, blocks: Sequence[str], widths: Mapping[str, int]) -> list[int | str]:
    """Return the widths of a network's convolutions in the form of Table 3.

    Args:
        network: Of `nni_plugin.networks`.
        blocks: Blocks that have left.
        widths: Channels left of the groups that are narrower, by their root layer.

    Returns:
        In forward order: channels, 0 for a layer that has left, `"M"` for a pooling.

    Example:
        >>> architecture("vgg19_bn", ["features.3:features.5"], {"features.0": 47})[:5]
        [47, 0, 'M', 128, 128]
    """
    names = Renumbering(blocks)
    shown: list[int | str] = []
    for name, layer in NETWORKS[network]().named_modules():
        if isinstance(layer, nn.MaxPool2d):  # on a map of 1x1 it does nothing, and may leave with a layer
            shown += ["M"] * (names.after(name) is not None)
        elif isinstance(layer, nn.Conv2d):
            shown.append(0 if names.after(name) is None else widths.get(name, layer.out_channels))
    return shown


def _planned(study: Study, seed: int, record: Mapping[str, Any]) -> dict[str, Any]:
    if "refused" in record:
        return dict(record)
    return {**_outcome(study, seed, _plan_of(record)), "planning_seconds": record["seconds"]}


def _outcome(study: Study, seed: int, plan: PruningPlan) -> dict[str, Any]:
    widths = {name: len(kept) for name, kept in plan.kept().items()}
    return {
        "blocks": list(plan.removed_blocks),
        "channels_removed": plan.channels_removed,
        "architecture": architecture(study.network, plan.removed_blocks, widths),
        **study.outcome(plan, seed),
    }


def _in_training(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row shows of a network that was pruned while it was fine-tuned."""
    return {
        **{name: record[name] for name in ("top1", "macs", "params", "macs_ratio", "images")},
        "channels_removed": record["channels_before"] - record["channels"],
        "seconds": record["seconds"]["training"],
    }


def _plan_of(record: Mapping[str, Any]) -> PruningPlan:
    return PruningPlan.from_json(json.dumps(record["plan"]))


def _dense_names(model: nn.Module) -> Renumbering:
    plan = getattr(model, "pruning_plan", None) or PruningPlan(())
    return Renumbering(plan.removed_blocks, plan.shells)


def _between_convolutions(network: str) -> tuple[str, ...]:
    """Return the layers of a residual network that the authors leave whole: all but the first of each block."""
    model = NETWORKS[network]()
    inner = any(name.endswith(".conv1") for name, _ in model.named_modules())
    return all_but_first_layers(model) if inner else ()
