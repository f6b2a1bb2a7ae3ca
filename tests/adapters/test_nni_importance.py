"""NNI's criteria against what its own pruners compute, and how a coupled group gets its score."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nni_plugin import MACs, plan_channels
from nni_plugin.adapters.nni.importance import IMPORTANCES
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import Criterion
from nni_plugin.errors import CriterionError
from nni_plugin.methods import create_criterion
from nni_plugin.planner import score_groups


class Residual(nn.Module):
    """Two coupled writers, a layer of its own, and a transposed convolution in groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.bn1 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.outer, self.bn2 = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        y = self.bn2(self.outer(torch.relu(self.bn1(self.inner(x)))))
        return self.head(torch.relu(self.up(x + y)).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        for layer in (model.bn, model.bn1, model.bn2):
            layer.weight.uniform_(-1, 1)
    return model


def _without_up(model):
    """Leave only groups that a batch normalisation writes."""
    model.up, model.head = nn.Identity(), nn.Linear(6, 3)


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(4, 3, 6, 6), torch.randint(3, (4,))) for _ in range(3)]


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _scores(method, model, batches):
    groups = [group for group in find_groups(model, batches[0][0]) if group.fixed is None]
    return score_groups(model, groups, create_criterion(method), batches, _loss)


@pytest.mark.parametrize(("method", "name"), [("nni:l1", "L1Norm"), ("nni:l2", "L2Norm"), ("nni:fpgm", "FPGM")])
def test_is_what_the_pruner_of_nni_computes(model, batches, method, name):
    import nni.compression.pruning as pruning

    scores = _scores(method, model, batches)
    pruner = getattr(pruning, f"{name}Pruner")(model, [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5}])
    metrics = pruner._calculate_metrics(pruner._collect_data())
    pruner.unwrap_model()
    for layer in ("stem", "inner"):
        expected = metrics[layer]["weight"].flatten().double()
        assert torch.allclose(scores[layer], expected, rtol=1e-5)


def test_level_by_output_channels_is_l1(model, batches):
    from nni.compression.pruning import LevelPruner

    scores = _scores("nni:level", model, batches)
    config = [{"op_names": ["inner"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    pruner = LevelPruner(model, config)
    expected = pruner._calculate_metrics(pruner._collect_data())["inner"]["weight"].flatten().double()
    pruner.unwrap_model()
    assert torch.allclose(scores["inner"], expected, rtol=1e-5)
    assert torch.equal(scores["inner"], _scores("nni:l1", model, batches)["inner"])


def test_taylor_is_what_the_pruner_of_nni_computes(model, batches):
    import nni
    from nni.compression.pruning import TaylorPruner
    from nni.compression.utils import TorchEvaluator

    def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
        model.eval()
        for batch in batches[:max_steps]:
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()

    ours = _scores("nni:taylor", model, batches)
    still = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)  # so that its training changes no weight
    evaluator = TorchEvaluator(train, still, lambda batch, model: _loss(model, batch))
    names = ["stem", "inner", "outer"]
    pruner = TaylorPruner(model, [{"op_names": names, "sparse_ratio": 0.5}], evaluator, training_steps=len(batches))
    seen = {}
    calculate = pruner._calculate_metrics
    pruner._calculate_metrics = lambda data: seen.setdefault("metrics", calculate(data))
    pruner.compress()
    pruner.unwrap_model()
    for layer in ("stem", "inner"):
        assert torch.allclose(ours[layer], seen["metrics"][layer]["weight"].flatten().double(), rtol=1e-4)


def test_slim_is_the_scale_behind_the_first_writer(model, batches):
    _without_up(model)
    scores = _scores("nni:slim", model.double(), [(x.double(), y) for x, y in batches[:1]])
    assert torch.equal(scores["stem"], model.bn.weight.abs().detach())
    assert torch.equal(scores["inner"], model.bn1.weight.abs().detach())


@pytest.mark.parametrize("method", [name for name in IMPORTANCES if name != "nni:taylor"])
def test_only_the_first_writer_counts(model, batches, method):
    _without_up(model)
    before = _scores(method, model, batches)
    with torch.no_grad():
        model.outer.weight.mul_(torch.rand(6, 1, 1, 1))
        model.bn2.weight.mul_(torch.rand(6))
    after = _scores(method, model, batches)
    assert torch.equal(before["stem"], after["stem"])


def test_outputs_of_a_transposed_convolution_in_groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Flatten(), nn.LazyLinear(3))
    image = torch.randn(1, 3, 2, 2)
    model(image)
    groups = {group.name: group for group in find_groups(model, image)}
    criterion = create_criterion("nni:l1")
    with criterion.collect(model):
        scores = criterion(groups["1"])
    weight = model[1].weight.detach().double()  # [6 inputs, 2 outputs a group, 2, 2]
    expected = torch.stack([weight[3 * group : 3 * group + 3, out].abs().sum() for group in (0, 1) for out in (0, 1)])
    assert torch.allclose(scores, expected, rtol=1e-12)


def test_taylor_goes_on_from_its_state(model, batches):
    groups = [group for group in find_groups(model, batches[0][0]) if group.fixed is None]
    whole, first, second = (create_criterion("nni:taylor") for _ in range(3))

    def run(criterion, part):
        with criterion.collect(model, groups):
            for batch in part:
                model.zero_grad()
                _loss(model, batch).backward()
                criterion.update()

    run(whole, batches)
    run(first, batches[:2])
    second.load_state_dict(first.state_dict())
    run(second, batches[2:])
    assert all(torch.equal(whole(group), second(group)) for group in groups)
    second.reset()
    with pytest.raises(CriterionError, match="no minibatch"):
        second(groups[0])


def test_taylor_without_gradients_says_so(model, batches):
    criterion = create_criterion("nni:taylor")
    with criterion.collect(model), pytest.raises(CriterionError, match=r"after backward\(\)"):
        criterion.update()
    model.inner.requires_grad_(False)
    with pytest.raises(CriterionError, match="'inner' had no gradient"):
        _scores("nni:taylor", model, batches)


@pytest.mark.parametrize("method", IMPORTANCES)
def test_every_one_prunes_to_a_budget(batches, method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 9, 3), nn.BatchNorm2d(9),
        nn.ReLU(), nn.Flatten(), nn.Linear(36, 3),
    ).eval()  # fmt: skip
    criterion = create_criterion(method)
    assert isinstance(criterion, Criterion)
    plan = plan_channels(model, batches[0][0], criterion, batches, _loss, MACs(0.5))
    assert plan.cost_after.macs <= 0.5 * plan.cost_before.macs


def test_without_nni_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nni.compression.pruning.tools", None)
    for method in ("nni:l1", "nni:taylor"):
        with pytest.raises(CriterionError, match=r"nni-plugin\[nni\]"):
            create_criterion(method)
    assert create_criterion("nni:slim").joint is False  # reads gamma alone, and needs no NNI


def test_nni_is_not_loaded_before_it_is_used():
    code = (
        "import sys, nni_plugin.methods as m; m.known_methods(); m.create_criterion('nni:slim')\n"
        "before = 'nni' in sys.modules; m.create_criterion('nni:l1'); print(before, 'nni' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
