"""timm's `feature_info` without the blocks that leave: the modules at which a network's features can be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from nni_plugin.layers.blocks import Block
from nni_plugin.renumbering import Renumbering


def features_without(
    model: nn.Module, blocks: Sequence[Block], shells: Sequence[str]
) -> Callable[[], Callable[[], None]]:
    """Prepare the change of a network's `feature_info`, if it has one.

    A feature at a block that leaves is read at the block before it, or at their container where that is left empty. It
    is dropped where that one has a feature of its own already, as in networks that list every block.

    Args:
        model: The network with the blocks.
        blocks: Those that leave.
        shells: Those of them that leave an identity in their place, at which the feature can still be read.

    Returns:
        A function that makes the change, and returns one that takes it back.
    """
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "module" in entry for entry in entries):
        return lambda: lambda: None
    leaving = [block for block in blocks if block.name not in shells]
    names = Renumbering([block.name for block in leaving])
    old, new, places = list(entries), [], set()
    listed = {entry["module"] for entry in entries if not any(block.holds(entry["module"]) for block in leaving)}
    for entry in entries:
        place = entry["module"]
        if place not in listed:
            place = _before(model, place, leaving)
            if place is None or place in listed:
                continue
        place = names.after(place)
        if place is not None and place not in places:
            places.add(place)
            new.append({**entry, "module": place})

    def change() -> Callable[[], None]:
        entries[:] = new
        return lambda: entries.__setitem__(slice(None), old)

    return change


def _before(model: nn.Module, place: str, leaving: Sequence[Block]) -> str | None:
    """Return where a feature of a block that leaves is read; None where nothing holds it any more."""
    block = next(block for block in leaving if block.holds(place))
    container, _, key = block.members[0].rpartition(".")
    prefix = f"{container}." if container else ""
    keys = list(model.get_submodule(container)._modules)
    staying = [other for other in keys if not any(b.holds(prefix + other) for b in leaving)]
    earlier = [other for other in keys[: keys.index(key)] if other in staying]
    if not earlier:
        return None if staying else container
    inner = f"{prefix}{earlier[-1]}{place.removeprefix(block.members[0])}"
    return inner if any(name == inner for name, _ in model.named_modules()) else prefix + earlier[-1]
