"""Saved networks come back bit by bit; whatever is wrong with a folder is one line of CheckpointError."""

import copy
import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from nni_plugin import checkpoint
from nni_plugin.adapters.models import create_model
from nni_plugin.budgets import MACs
from nni_plugin.checkpoint import from_pretrained, input_shape_of, save_pretrained
from nni_plugin.criteria.taylor import TaylorFO
from nni_plugin.errors import CheckpointError
from nni_plugin.plan import GroupPlan, ModelIdentity, PruningPlan
from nni_plugin.planner import plan_channels

X = (3, 32, 32)


def images(*shape: int) -> Tensor:
    return torch.randn(4, *(shape or X), generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def randomised(model: nn.Module) -> Any:
    """Give vectors and statistics values of their own: some builders start gates at zero."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def pruned(model: nn.Module, ratio: float = 0.5) -> Any:
    model = randomised(model)
    x = images()
    plan = plan_channels(model, x, TaylorFO(), [(x, torch.arange(4))], loss, MACs(ratio))
    assert plan.channels_removed > 0
    return plan.apply(model, x)


@functools.cache
def _resnet20() -> Any:
    torch.manual_seed(0)
    return pruned(create_model("resnet20", "nni_plugin", width_mult=0.5))


@pytest.fixture
def network() -> Any:
    return copy.deepcopy(_resnet20())


@pytest.fixture
def saved(network: Any, tmp_path: Path) -> Path:
    return save_pretrained(network, tmp_path / "saved")


def same(model: nn.Module, loaded: nn.Module, x: Tensor | None = None) -> None:
    x = images() if x is None else x
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def refused(directory: Path, match: str, **arguments: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        from_pretrained(directory, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1200


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the config as somebody who knows its form would."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return directory


def replace_weights(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """Put other tensors there with a matching hash, so that only the later checks can object."""
    content = safetensors.torch.save(tensors)
    (directory / "model.safetensors").write_bytes(content)
    weights = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return edit(directory, lambda config: config.update(weights=weights))


# -- equality -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "library"), [("resnet18", "timm"), ("mobilenet_v2", "torchvision"), ("resnet20", "nni_plugin")]
)
def test_pruned_networks_come_back(name: str, library: Any, tmp_path: Path) -> None:
    model = pruned(create_model(name, library, num_classes=10))
    assert save_pretrained(model, tmp_path / "a", example_input_shape=X) == tmp_path / "a"
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]
    loaded: Any = from_pretrained(tmp_path / "a")
    same(model, loaded)
    plan, again = model.pruning_plan, loaded.pruning_plan
    assert isinstance(plan, PruningPlan)
    assert isinstance(again, PruningPlan)
    assert again.digest == plan.digest
    assert again.explain() == plan.explain()
    assert input_shape_of(tmp_path / "a") == X


def test_in_a_fresh_process(network: Any, saved: Path, tmp_path: Path) -> None:
    torch.save({"x": images(), "y": network(images()).detach()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from nni_plugin.checkpoint import from_pretrained\n"
        "want = torch.load(sys.argv[2])\n"
        "model = from_pretrained(sys.argv[1])\n"
        "assert torch.equal(model(want['x']), want['y'])\n"
        "print(model.pruning_plan.digest)\n"
    )
    command = [sys.executable, "-P", "-c", code, str(saved), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [network.pruning_plan.digest]


def test_pruned_twice_and_saved_again(network: Any, tmp_path: Path) -> None:
    twice = pruned(network, 0.7)
    first = from_pretrained(save_pretrained(twice, tmp_path / "a"))
    second = from_pretrained(save_pretrained(first, tmp_path / "b"))
    same(twice, second)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unpruned(tmp_path: Path) -> None:
    model = randomised(create_model("resnet20", "nni_plugin", in_chans=1))
    save_pretrained(model, tmp_path / "a", extra={"top1": 0.5})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["plan"] is None
    assert config["input_shape"] == [1, 32, 32]
    assert config["extra"] == {"top1": 0.5}
    loaded: Any = from_pretrained(tmp_path / "a")
    assert not hasattr(loaded, "pruning_plan")
    same(model, loaded, images(1, 32, 32))


def test_a_plan_that_removes_nothing_is_no_warning(tmp_path: Path) -> None:
    model = randomised(create_model("resnet20", "nni_plugin", width_mult=0.5))
    plan = PruningPlan((GroupPlan("conv1", model.conv1.out_channels, tuple(range(model.conv1.out_channels))),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = from_pretrained(save_pretrained(model, tmp_path / "a", plan=plan))
    assert loaded.pruning_plan == plan


def test_users_own_timm_model_takes_timms_input_size(tmp_path: Path) -> None:
    model = randomised(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=3))
    save_pretrained(model, tmp_path / "a")
    assert input_shape_of(tmp_path / "a") == X
    same(model, from_pretrained(tmp_path / "a"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precision(network: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    network.to(dtype)
    loaded: Any = from_pretrained(save_pretrained(network, tmp_path / "a"))
    assert next(loaded.parameters()).dtype == dtype
    same(network, loaded, images().to(dtype))


def test_mixed_precision_and_nan(network: Any, tmp_path: Path) -> None:
    network.conv1.half()
    with torch.no_grad():
        network.fc.weight[0, 0] = torch.nan
    loaded: Any = from_pretrained(save_pretrained(network, tmp_path / "a"))
    assert loaded.conv1.weight.dtype == torch.float16
    assert loaded.fc.weight.dtype == torch.float32
    assert torch.equal(loaded.fc.weight.isnan(), network.fc.weight.isnan())


def test_memory_format_comes_back(network: Any, tmp_path: Path) -> None:
    network.to(memory_format=torch.channels_last)
    loaded: Any = from_pretrained(save_pretrained(network, tmp_path / "a"))
    for ours, theirs in zip(network.parameters(), loaded.parameters(), strict=True):
        assert ours.stride() == theirs.stride()
    same(network, loaded)


def test_buffers_outside_the_state_keep_their_dtype(tmp_path: Path) -> None:
    model = WithTable().to(torch.bfloat16)
    loaded: Any = from_pretrained(save_pretrained(model, tmp_path / "a"), model=WithTable())
    assert loaded.table.dtype == torch.bfloat16
    same(model, loaded, torch.randn(2, 4, dtype=torch.bfloat16))


def test_saving_and_loading_leave_the_model_and_the_random_state(network: Any, tmp_path: Path) -> None:
    network.train()
    before, state = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    save_pretrained(network, tmp_path / "a")
    from_pretrained(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_inside_inference_mode(network: Any, tmp_path: Path) -> None:
    with torch.inference_mode():
        loaded: Any = from_pretrained(save_pretrained(network, tmp_path / "a"))
    same(network, loaded)
    loaded(images()).sum().backward()


def test_data_parallel_is_looked_through(network: Any, tmp_path: Path) -> None:
    save_pretrained(nn.DataParallel(network), tmp_path / "a")
    same(network, from_pretrained(tmp_path / "a"))


# -- custom classes -------------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("table", torch.linspace(0.1, 0.9, 4), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * self.table


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu())


def test_custom_class(tmp_path: Path) -> None:
    model, dense = pruned(Own()), Own()
    before = copy.deepcopy(dense.state_dict())
    directory = save_pretrained(model, tmp_path / "a", example_input_shape=X)
    refused(directory, "'Own'.*model=")
    same(model, from_pretrained(directory, model=dense))
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())
    refused(directory, "pruned already", model=model)
    refused(directory, "another model", model=create_model("resnet20", "nni_plugin"))
    with pytest.raises(CheckpointError, match="example_input_shape"):
        save_pretrained(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_custom_class_unpruned_needs_no_shape(tmp_path: Path) -> None:
    model = Own()
    directory = save_pretrained(model, tmp_path / "a")
    same(model, from_pretrained(directory, model=Own()))
    with pytest.raises(CheckpointError, match="example_input_shape"):
        input_shape_of(directory)


def test_tied_tensors(tmp_path: Path) -> None:
    model, x = Tied(), torch.randn(2, 6)
    directory = save_pretrained(model, tmp_path / "a")
    stored = safetensors.torch.load_file(directory / "model.safetensors")
    assert sorted(stored) == ["a.bias", "a.weight", "b.bias"]
    loaded: Any = from_pretrained(directory, model=Tied())
    same(model, loaded, x)
    assert loaded.a.weight is loaded.b.weight
    same(model, from_pretrained(directory, model=Tied(tie=False)), x)
    apart = save_pretrained(Tied(tie=False), tmp_path / "b")
    refused(apart, "one with 'a.weight', got two", model=Tied())


def test_views_of_one_memory(tmp_path: Path) -> None:
    model, block = Tied(tie=False), torch.randn(12, 6)
    model.a.weight.data, model.b.weight.data = block[:6], block[6:]
    same(model, from_pretrained(save_pretrained(model, tmp_path / "a"), model=Tied(tie=False)), torch.randn(2, 6))


# -- saving: what is refused, and what stays ------------------------------------------------------------


def test_cut_without_a_plan_is_refused(network: Any, tmp_path: Path) -> None:
    del network.pruning_plan
    with pytest.raises(CheckpointError, match=r"shape of tensor '(conv1|layer|stage).*weight'"):
        save_pretrained(network, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_wrong_identity_or_plan_is_refused(network: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another model"):
        save_pretrained(network, tmp_path / "a", identity=ModelIdentity("timm", "resnet18"), example_input_shape=X)
    narrow = ModelIdentity("nni_plugin", "resnet20", {"width_mult": 0.25})
    with pytest.raises(CheckpointError, match="channels in the plan"):
        save_pretrained(network, tmp_path / "a", identity=narrow)
    more = ModelIdentity("nni_plugin", "resnet20", {"width_mult": 0.5, "num_classes": 11})
    with pytest.raises(CheckpointError, match=r"tensor 'fc.weight'"):
        save_pretrained(network, tmp_path / "a", identity=more)
    with pytest.raises(CheckpointError, match="JSON"):
        save_pretrained(network, tmp_path / "a", extra={"model": network})
    with pytest.raises(CheckpointError, match="input shape"):
        save_pretrained(network, tmp_path / "a", example_input_shape=(3, -32, 32))
    assert os.listdir(tmp_path) == []


def test_overwriting_keeps_other_files(network: Any, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    other = randomised(create_model("resnet20", "nni_plugin"))
    save_pretrained(other, saved)
    same(other, from_pretrained(saved))
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors", "notes.txt"]
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_link_is_replaced_not_followed(network: Any, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_text("mine")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").symlink_to(tmp_path / "foreign")
    save_pretrained(network, tmp_path / "a")
    assert (tmp_path / "foreign").read_text() == "mine"
    same(network, from_pretrained(tmp_path / "a"))


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_full_disk_while_moving(network: Any, saved: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    calls, replace = [0], os.replace

    def full(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == fails_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("nni_plugin.checkpoint.os.replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_pretrained(randomised(create_model("resnet20", "nni_plugin")), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    same(network, from_pretrained(saved))


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "safetensors.torch.save", "tempfile.mkdtemp"])
def test_full_disk_leaves_nothing(network: Any, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"nni_plugin.checkpoint.{function}", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save_pretrained(network, tmp_path / "new" / "folder")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_old_files_are_kept_when_they_cannot_be_put_back(
    network: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / "model.safetensors").read_bytes()
    calls, replace = [0], os.replace

    def full(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("nni_plugin.checkpoint.os.replace", full)
    with pytest.raises(CheckpointError, match="they are in"):
        save_pretrained(network, saved)
    assert next(saved.glob(".saving-*/old/model.safetensors")).read_bytes() == before


def test_interrupted_while_writing(network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nni_plugin.checkpoint.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(network, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_file_or_folder_in_the_way(network: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "a" / "config.json").mkdir(parents=True)
    (tmp_path / "a" / "config.json" / "inside").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "a"):
        with pytest.raises(CheckpointError, match="could not be written"):
            save_pretrained(network, target)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "a" / "config.json" / "inside").read_text() == "mine"
    assert os.listdir(tmp_path / "a") == ["config.json"]


# -- loading: files -------------------------------------------------------------------------------------


def test_missing_folder_or_files(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "Expected a folder.*got nothing")
    refused(saved / "config.json", "Expected a folder.*got a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"config\.json.*got none")
    (saved / "model.safetensors").unlink()
    refused(saved, r"model\.safetensors.*got none")
    os.mkfifo(saved / "model.safetensors")
    refused(saved, r"model\.safetensors.*got none")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights(saved: Path, size: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(saved, "truncated")


@pytest.mark.parametrize("where", [9, 500, -1])
def test_flipped_bit(saved: Path, where: int) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    refused(saved, "SHA-256")


def test_damaged_weights_with_a_matching_hash(saved: Path) -> None:
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[20] ^= 0xFF
    (saved / "model.safetensors").write_bytes(content)
    edit(saved, lambda c: c["weights"].update(sha256=hashlib.sha256(content).hexdigest()))
    refused(saved, "cannot be read")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickle_in_disguise(saved: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved / "model.safetensors"
    if form == "pickle":
        path.write_bytes(pickle.dumps([Bomb()] * 3))
    else:
        torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    weights = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit(saved, lambda c: c.update(weights=weights))
    refused(saved, "a pickle or a zip of torch.save; it is not opened")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_link_out_of_the_folder(saved: Path, name: str, tmp_path: Path) -> None:
    outside = (saved / name).rename(tmp_path / "outside")
    (saved / name).symlink_to(outside)
    refused(saved, "leads out of it")
    (saved / name).unlink()
    (saved / name).symlink_to(Path("..") / "outside")
    refused(saved, "leads out of it")
    (saved / name).unlink()
    (saved / name).symlink_to(saved / name)
    refused(saved, name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update(renamed=t.pop("fc.weight")), r"tensor 'fc\.weight', got no such tensor"),
        (lambda t: t.pop("fc.bias"), r"tensor 'fc\.bias', got no such tensor"),
        (lambda t: t.update(more=torch.zeros(1)), "no such tensor as shape of tensor 'more'"),
        (lambda t: t.update({"fc.bias": torch.zeros(11)}), r"\[10\] as shape of tensor 'fc\.bias', got \[11\]"),
        (lambda t: t.update({"fc.bias": t["fc.bias"].double()}), r"dtype float32 of tensor 'fc\.bias', got float64"),
    ],
    ids=["renamed", "missing", "extra", "shape", "dtype"],
)
def test_tensors_that_do_not_belong(saved: Path, change: Callable[[dict[str, Tensor]], Any], match: str) -> None:
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    change(tensors)
    refused(replace_weights(saved, tensors), match)


def test_tensors_and_list_changed_alike(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    tensors["fc.bias"] = tensors["fc.bias"].long()
    replace_weights(saved, tensors)
    edit(saved, lambda c: c["tensors"]["fc.bias"].update(dtype="int64"))
    refused(saved, r"dtype torch\.float32 of tensor 'fc\.bias', got torch\.int64")


# -- loading: config ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"schema_version": NaN}', "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not JSON"),
        (b'{"schema_version": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"[]", "object.*got list"),
        (b'"text"', "object.*got str"),
        (b"null", "object.*got NoneType"),
        (b"{}", "schema_version 1.*got None"),
        (b'{"schema_version": true}', "schema_version 1.*got True"),
        (b'{"schema_version": 1}', "Expected 'model' as an object"),
    ],
    ids=range(13),
)
def test_config_of_another_form(saved: Path, content: bytes, match: str) -> None:
    (saved / "config.json").write_bytes(content)
    refused(saved, match)


def test_huge_config(saved: Path) -> None:
    with open(saved / "config.json", "ab") as file:
        file.truncate(checkpoint.MAX_CONFIG_BYTES + 1)
    refused(saved, "at most 50000000 bytes")


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        place: Any = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


NESTED = json.loads("[" * 500 + "]" * 500)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set("schema_version", to=2), "schema_version 1.*got 2"),
        (_set("weights", to="../../etc/passwd"), "'weights' as an object"),
        (_set("weights", "bytes", to="many"), "sha256 and bytes"),
        (_set("weights", "bytes", to=10**30), "Expected 1000.* bytes"),
        (_set("tensors", to=[]), "'tensors' as an object"),
        (_set("tensors", "fc.bias", to=3), "shape and dtype of tensor 'fc.bias'"),
        (_set("tensors", "fc.bias", "shape", to=[-10]), "shape and dtype of tensor 'fc.bias'"),
        (_set("tensors", "fc.bias", "dtype", to="load"), "shape and dtype of tensor 'fc.bias'"),
        (_set("tensors", "fc.bias", "same_as", to="none"), "shape and dtype of tensor 'fc.bias'"),
        (_set("tensors", "fc.bias", "same_as", to=["fc.weight"]), "is damaged"),
        (_set("tensors", "fc.bias", "same_as", to="fc.bias"), "shape and dtype of tensor 'fc.bias'"),
        (_set("tensors", "fc.bias", "same_as", to="fc.weight"), "to be like 'fc.weight'"),
        (_set("tensors", "fc.bias", "shape", to=[11]), r"\[11\] as shape of tensor 'fc\.bias', got \[10\]"),
        (_set("tensors", "more\nlines", to={"shape": [], "dtype": "float32"}), r"'more\\nlines', got no such tensor"),
        (_set("buffer_dtypes", to=None), "'buffer_dtypes' as an object"),
        # Identity.
        (_set("model", to={}), "library, name and kwargs"),
        (_set("model", "kwargs", to=[]), "library, name and kwargs"),
        (_set("model", "library", to=3), "library and a name as text"),
        (_set("model", "library", to="os"), "Unknown library 'os'"),
        (_set("model", "library", to="/etc"), "Unknown library '/etc'"),
        (_set("model", "name", to="../../x"), r"no model '\.\./\.\./x'"),
        (_set("model", "name", to="/etc/passwd"), "no model '/etc/passwd'"),
        (_set("model", "name", to="resnet9000\n\ud800"), "no model"),
        (_set("model", "name", to="x" * 100_000), "no model"),
        (_set("model", to={"library": "timm", "name": "hf-hub:a/b", "kwargs": {}}), "no model 'hf-hub:a/b'"),
        (_set("model", to={"library": "timm", "name": "local-dir:/tmp", "kwargs": {}}), "no model 'local-dir:/tmp'"),
        (_set("model", "kwargs", "pretrained", to=True), "'pretrained'.*not taken"),
        (_set("model", "kwargs", "checkpoint_path", to="/x"), "'checkpoint_path'.*not taken"),
        (_set("model", "kwargs", "pretrained_cfg", to={"file": "/x"}), "'pretrained_cfg'.*not taken"),
        (_set("model", "kwargs", "weights", to="DEFAULT"), "'weights'.*not taken"),
        (_set("model", "kwargs", "nonsense", to=1), "nonsense"),
        (_set("model", "kwargs", "nonsense", to={}), "'nonsense'.*must be text"),
        (_set("model", "kwargs", "num_classes", to=-5), "num_classes"),
        (_set("model", "kwargs", "num_classes", to=10**12), "arguments up to"),
        (_set("model", "kwargs", "width_mult", to=1e4), "cannot be rebuilt"),
        (_set("model", "kwargs", "width_mult", to="wide"), "could not build"),
        (_set("model", "kwargs", "deep", to=NESTED), "cannot be rebuilt|is damaged"),
        # Plan.
        (_set("plan", to=[]), "schema_version"),
        (_set("plan", to=3), "schema_version"),
        (_set("plan", "schema_version", to=7), "schema_version"),
        (_set("plan", "groups", to={}), "expected a list"),
        (_set("plan", "groups", 0, to=None), "Damaged plan"),
        (_set("plan", "groups", 0, "name", to="../../x"), r"another model.*'\.\./\.\./x'"),
        (_set("plan", "groups", 0, "total", to=10**9), "1000000000 channels in the plan"),
        (_set("plan", "groups", 0, "kept", to=[0]), "as shape of tensor"),
        (_set("plan", "groups", 0, "kept", to=[-1]), "ascending"),
        (_set("plan", "groups", 0, "factors", to=[10**400]), "is damaged"),
        (_set("plan", "removed_blocks", to=["layer1"]), "blocks"),
        (_set("plan", to=None), "as shape of tensor"),
        (_set("plan", "model", "name", to="resnet56"), "another model"),
        (_set("plan", "model", to=5), "Damaged plan"),
        # Input shape.
        (_set("input_shape", to=None), "input_shape"),
        (_set("input_shape", to=[3, 10**6, 10**6]), "input shape.*at most"),
        (_set("input_shape", to=[3, -32, 32]), "positive integers"),
        (_set("input_shape", to=[3, 0, 32]), "positive integers"),
        (_set("input_shape", to=[3, 32.0, 32]), "positive integers"),
        (_set("input_shape", to=[3, True, 32]), "positive integers"),
        (_set("input_shape", to=[[3, 32, 32], 5]), "positive integers"),
        (_set("input_shape", to=[]), "positive integers"),
        (_set("input_shape", to={}), "at least one input"),
        (_set("input_shape", to="3x32x32"), "positive integers"),
        (_set("input_shape", to=[1] * 9), "positive integers"),
        (_set("input_shape", to=[[3, 32, 32]] * 17), "positive integers"),
        (_set("input_shape", to={"nonsense": [3, 32, 32]}), "cannot be rebuilt"),
        (_set("input_shape", to=[5, 32, 32]), "cannot be rebuilt"),
    ],
)
def test_config_with_one_thing_wrong(saved: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    refused(edit(saved, change), match)


def test_plan_of_another_network(saved: Path, tmp_path: Path) -> None:
    vgg = pruned(create_model("vgg19_bn", "nni_plugin", width_mult=0.125))
    plan = json.loads(vgg.pruning_plan.to_json())
    plan["model"] = None
    refused(edit(saved, _set("plan", to=plan)), "another model: it has a group 'features")


def test_too_many_layers_are_stopped_while_building(saved: Path) -> None:
    deep = {"library": "timm", "name": "vit_tiny_patch16_224", "kwargs": {"depth": 100_000, "img_size": 32}}

    def change(config: dict[str, Any]) -> None:
        config.update(model=deep, plan=None)

    refused(edit(saved, change), "more tensors than it was saved with")


def test_too_big_a_network_is_stopped_while_building(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_ELEMENTS", 50_000)
    refused(saved, "more than 50000 elements")


def test_no_such_device(saved: Path) -> None:
    refused(saved, "device 'nonsense'", device="nonsense")


def test_several_inputs(tmp_path: Path) -> None:
    class Sum(Own):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            return super().forward(x if y is None else x + y)

    x = images()
    for shape in ([X, X], {"x": X, "y": X}):
        model = randomised(Sum())
        plan = PruningPlan((GroupPlan("stem", 16, tuple(range(9))),))
        plan.apply(model, (x, x))
        directory = save_pretrained(model, tmp_path / "a", example_input_shape=shape)
        same(model, from_pretrained(directory, model=Sum()))
        with pytest.raises(CheckpointError, match="one input shape"):
            input_shape_of(directory)
