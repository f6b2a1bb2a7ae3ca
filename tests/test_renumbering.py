"""Names before and after blocks leave: against a real nested container from which they are deleted."""

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nni_plugin.renumbering import Renumbering, ends_of


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.dense_name = name


def nested() -> nn.Sequential:
    """Five Sequentials of five modules each, which remember their names."""
    return nn.Sequential(*(nn.Sequential(*(Named(f"{i}.{j}") for j in range(5))) for i in range(5)))


def delete(model: nn.Sequential, name: str) -> None:
    """Delete a module by its dense name, and let those behind it move up."""
    for parent in model.modules():
        for key, child in list(parent.named_children()):
            if getattr(child, "dense_name", None) == name:
                del parent[int(key)]  # type: ignore[operator]


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_against_real_containers(gone: set[tuple[int, int]]) -> None:
    names = {f"{i}.{j}" for i, j in gone}
    model, renumbering = nested(), Renumbering(sorted(names))
    for name in names:
        delete(model, name)
    now = {module.dense_name: name for name, module in model.named_modules() if isinstance(module, Named)}
    for name, module in nested().named_modules():
        if isinstance(module, Named):
            assert renumbering.after(name) == now.get(name)
            assert renumbering.after(f"{name}.conv.weight") == (f"{now[name]}.conv.weight" if name in now else None)
    for dense, slim in now.items():
        assert renumbering.before(slim) == dense
        assert renumbering.before(f"{slim}.conv.0") == f"{dense}.conv.0"


def test_containers_inside_containers() -> None:
    names = Renumbering(["0", "2.1", "2.3"])
    assert names.after("2.4.x.0") == "1.2.x.0"
    assert names.before("1.2.x.0") == "2.4.x.0"
    assert names.after("0.5") is None
    assert names.after("2.1.weight") is None


def test_runs_shells_and_names_without_numbers() -> None:
    names = Renumbering(["f.3:f.5", "blocks.1", "blocks.2.attn", "s3.b2", "e.layer_3"], ["blocks.1", "blocks.2.attn"])
    assert ends_of("f.3:f.5") == ("f.3", "f.5")
    assert [names.after(f"f.{i}") for i in (2, 3, 4, 5, 6)] == ["f.2", None, None, None, "f.3"]
    assert names.after("blocks.2.attn.qkv") == names.before("blocks.2.attn.qkv") == "blocks.2.attn.qkv"
    assert names.after("blocks.1") == "blocks.1"
    assert (names.after("s3.b2.conv1"), names.after("s3.b3"), names.after("s3.b20")) == (None, "s3.b3", "s3.b20")
    assert (names.after("e.layer_3"), names.after("e.layer_4")) == (None, "e.layer_4")
    assert names.block_before("f.3:f.5") == "f.6:f.8"
    assert names.block_before("blocks.1") == "blocks.1"
