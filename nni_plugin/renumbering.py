"""Names before and after blocks are taken out of their containers, by the names alone.

A block that leaves a numbered container (`nn.Sequential`, `nn.ModuleList`) lets those behind it move up: without
`layer1.1`, what was `layer1.2` is `layer1.1`. A plan names everything as in the dense network; this is the way to the
smaller network's names and back.
"""

from __future__ import annotations

from collections.abc import Iterable


def ends_of(block: str) -> tuple[str, str]:
    """Return the first and last module of a block's name; they differ for a run `"features.3:features.5"`."""
    first, _, last = block.partition(":")
    return first, last or first


class Renumbering:
    """What the modules of a network are called once blocks have left it.

    Args:
        removed: Names of the blocks, a run of modules as `"features.3:features.5"`.
        shells: Those of them that leave something in their place, so that nobody moves up.

    Example:
        >>> names = Renumbering(["layer1.1", "features.3:features.5"])
        >>> names.after("layer1.2.conv1"), names.before("layer1.1.conv1")
        ('layer1.1.conv1', 'layer1.2.conv1')
        >>> names.after("features.7"), names.after("features.4")
        ('features.4', None)
    """

    def __init__(self, removed: Iterable[str], shells: Iterable[str] = ()) -> None:
        staying = set(shells)
        self._paths: set[str] = set()
        self._gone: dict[str, set[int]] = {}
        for block in removed:
            if block in staying:
                continue
            first, last = ends_of(block)
            self._paths |= {first, last}
            (container, _, low), (other, _, high) = first.rpartition("."), last.rpartition(".")
            if low.isdecimal() and high.isdecimal() and container == other:
                self._gone.setdefault(container, set()).update(range(int(low), int(high) + 1))

    def after(self, name: str) -> str | None:
        """Return the name in the smaller network of a dense network's module or tensor; None where it has left."""
        dense: list[str] = []
        result: list[str] = []
        for part in name.split("."):
            gone = self._gone.get(".".join(dense))
            dense.append(part)
            if ".".join(dense) in self._paths or (gone and part.isdecimal() and int(part) in gone):
                return None
            result.append(str(int(part) - sum(i < int(part) for i in gone)) if gone and part.isdecimal() else part)
        return ".".join(result)

    def before(self, name: str) -> str:
        """Return the name in the dense network of a module or tensor of the smaller one."""
        dense: list[str] = []
        for part in name.split("."):
            gone = self._gone.get(".".join(dense))
            if gone and part.isdecimal():
                index = int(part)
                for i in sorted(gone):
                    index += i <= index
                part = str(index)
            dense.append(part)
        return ".".join(dense)

    def block_before(self, block: str) -> str:
        """Return the name in the dense network of a block of the smaller one."""
        first, last = ends_of(block)
        return self.before(first) if first == last else f"{self.before(first)}:{self.before(last)}"
