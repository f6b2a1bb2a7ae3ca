"""Imprinting: its identities, a redundant block that gains nothing, and a network that is as it was."""

import math

import pytest
import torch
from layered import batches, chain, loss_of, plant, vgg
from networks_at_random import assert_same, state_of
from torch import nn

from nni_plugin.errors import CriterionError, DataError
from nni_plugin.layers import Block, Imprinting, removable_blocks
from nni_plugin.layers.imprinting import imprinted_weights, predictions

CLASSES = 4


def _score(model, data, held_out=None, blocks=None, **options):
    importance = Imprinting(**options)
    example = data[0][0][:1]
    blocks = removable_blocks(model, example) if blocks is None else blocks
    gains = importance.score(model, example, blocks, data, held_out=data if held_out is None else held_out)
    return importance, gains


def _by_hand(model, data, held_out, paths, target_length):
    """Accuracies of the proxies behind some modules, from all images at once: sums per class in plain loops."""
    images, labels = (torch.cat(part) for part in zip(*data, strict=True))
    others, answers = (torch.cat(part) for part in zip(*held_out, strict=True))
    model.eval()
    found = []
    for path in paths:
        seen = []
        hook = model.get_submodule(path).register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model(images), model(others)
        hook.remove()
        side = min(max(1, round(math.sqrt(target_length / seen[0].shape[1]))), seen[0].shape[2])
        train, test = (torch.nn.functional.adaptive_avg_pool2d(output, side).flatten(1) for output in seen)
        means = torch.stack([train[labels == c].mean(0) for c in range(CLASSES)])
        cosine = torch.nn.functional.cosine_similarity(test[:, None], means[None], dim=2)
        found.append(float((cosine.argmax(1) == answers).double().mean()))
    return found


def test_accuracies_are_those_of_class_means_worked_out_by_hand():
    model, data, held_out = chain(3), batches(3), batches(2, seed=8)
    importance, gains = _score(model, data, held_out, target_length=100)
    expected = _by_hand(model, data, held_out, list(gains), 100)
    assert list(importance.accuracies.values()) == pytest.approx(expected, abs=1e-12)
    assert 0 < min(expected) < 1
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in held_out)
    assert importance.classifier_accuracy == right / sum(len(y) for _, y in held_out)


def test_gains_of_blocks_in_a_row_add_up_to_the_last_accuracy():
    importance, gains = _score(chain(4), batches(3), batches(2, seed=8))
    assert sum(gains.values()) == pytest.approx(list(importance.accuracies.values())[-1], abs=1e-12)
    assert gains["1"] == importance.accuracies["1"]


def test_negative_gains_stay_negative():
    """A block that takes away what tells classes apart."""
    model = chain(3)
    with torch.no_grad():
        model[2].inside[1].bias.fill_(-1e6)  # nothing comes through its activation
    _, gains = _score(model, batches(3), batches(2, seed=8))
    assert gains["2"] < -0.5


def test_separable_classes_are_told_apart_by_every_proxy():
    centres = 10 * torch.eye(CLASSES, dtype=torch.float64).repeat_interleave(2, 1)
    torch.manual_seed(3)
    labels = torch.arange(40) % CLASSES
    images = (centres[labels] + 0.1 * torch.randn(40, 8, dtype=torch.float64))[..., None, None].expand(40, 8, 4, 4)
    data = [(images.contiguous(), labels)]
    network = nn.Sequential(*(nn.Sequential(nn.Identity()) for _ in range(2)), nn.Flatten(), nn.Linear(128, CLASSES))
    blocks = [Block("0", "block", ("0",), (8, 4, 4)), Block("1", "block", ("1",), (8, 4, 4))]
    importance, gains = _score(network.double(), data, blocks=blocks)
    assert importance.accuracies == {"0": 1.0, "1": 1.0}
    assert gains == {"0": 1.0, "1": 0.0}


def test_products_rank_classes_as_cosines_do_whatever_the_scale():
    torch.manual_seed(0)
    means, embeddings = torch.randn(5, 30, dtype=torch.float64), torch.randn(50, 30, dtype=torch.float64)
    weights = imprinted_weights(means)
    assert torch.allclose(weights.norm(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(embeddings[:, None], means[None], dim=2)
    assert torch.equal(predictions(weights, embeddings), cosine.argmax(1))
    assert torch.equal(predictions(imprinted_weights(means * 1e-9), embeddings * 1e7), cosine.argmax(1))
    assert torch.equal(imprinted_weights(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_minibatches_classes_and_order_of_samples_do_not_matter():
    data, held_out = batches(4), batches(2, seed=8)
    images, labels = (torch.cat(part) for part in zip(*data, strict=True))
    model = chain(3)
    expected, gains = _score(model, data, held_out)
    together, _ = _score(model, [(images, labels)], held_out)
    order = torch.randperm(len(labels))
    uneven = list(zip(images[order].split(5), labels[order].split(5), strict=True))
    shuffled, again = _score(model, uneven, held_out)
    assert together.accuracies == shuffled.accuracies == expected.accuracies
    assert again == gains
    renamed = [(x, CLASSES - 1 - y) for x, y in data]
    turned, _ = _score(model, renamed, [(x, CLASSES - 1 - y) for x, y in held_out])
    assert turned.accuracies == expected.accuracies


def test_a_block_that_does_nothing_gains_nothing():
    model = chain(4)
    plant(model[2])
    importance, gains = _score(model, batches(3), batches(2, seed=8))
    assert gains["2"] == 0.0
    assert importance.accuracies["1"] == importance.accuracies["2"]
    with_stem, over_stem = _score(plant_first(chain(4)), batches(3), batches(2, seed=8), stem=True)
    assert over_stem["1"] == 0.0
    assert with_stem.accuracies["1"] > 0


def plant_first(model):
    plant(model[1])
    return model


def test_gain_is_over_what_comes_in_where_the_block_before_is_no_candidate():
    """A strided block between two candidates: what it gains is not laid at the next one's door."""
    model = chain(2, strided=True)
    data, held_out = batches(3), batches(2, seed=8)
    importance, gains = _score(model, data, held_out)
    assert list(gains) == ["1", "2", "4", "5"]
    behind = _by_hand(model, data, held_out, ["1", "2", "3", "4", "5"], 2048)
    expected = [behind[0], behind[1] - behind[0], behind[3] - behind[2], behind[4] - behind[3]]
    assert list(gains.values()) == pytest.approx(expected, abs=1e-12)
    assert behind[2] != behind[1]
    assert list(importance.accuracies.values()) == [behind[0], behind[1], behind[3], behind[4]]


def test_plain_networks_and_branches():
    _, gains = _score(vgg(), batches(3))
    assert len(gains) == 2
    model, block = chain(1), Block("1.inside", "branch", ("1.reduce", "1.inside"), (6, 6, 6))
    model[1].after = nn.Identity()
    whole, _ = _score(model, batches(3), blocks=[Block("1", "block", ("1",), (6, 6, 6))])
    branch, _ = _score(model, batches(3), blocks=[block])
    assert branch.accuracies["1.inside"] == whole.accuracies["1"]  # the stream behind it, not the branch alone
    with pytest.raises(CriterionError, match="must read the stream"):
        _score(model, batches(3), blocks=[Block("1.inside", "branch", ("1.inside",), (6, 6, 6))])


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(training):
    model = chain(3).train(training)
    model[2].inside.train(not training)
    before, modes = state_of(model), [module.training for module in model.modules()]
    loss_of(model, batches(1)[0]).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = state_of(model)
    _score(model, batches(2))
    assert_same(model, before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is kept for parameter, kept in zip(model.parameters(), gradients, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _failing(data):
    yield data[0]
    raise RuntimeError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "held_out", "error", "match"),
    [
        (lambda d: [], None, DataError, "no minibatch to imprint"),
        (lambda d: d, lambda d: [], DataError, "no minibatch held out"),
        (lambda d: [(x[y != 2], y[y != 2]) for x, y in d], None, DataError, "1 of 4 classes have no sample.*labels 2"),
        (lambda d: [(x, y + 1) for x, y in d], None, DataError, r"0\.\.3 for 4 classes, got 4"),
        (lambda d: [(x, y - 1) for x, y in d], None, DataError, r"0\.\.3 for 4 classes, got -1"),
        (lambda d: d, lambda d: [(x, y + 7) for x, y in d], DataError, r"0\.\.3 for 4 classes"),
        (lambda d: [(x, y.double()) for x, y in d], None, DataError, "one class a sample"),
        (lambda d: [x for x, _ in d], None, DataError, "minibatches .inputs, labels.*Tensor"),
        (lambda d: [(x * math.nan, y) for x, y in d], None, CriterionError, "behind block '1' has values.*not finite"),
        (lambda d: d, lambda d: [(x * math.inf, y) for x, y in d], CriterionError, "not finite"),
        (_failing, None, RuntimeError, "disk"),
        (lambda d: d, _failing, RuntimeError, "disk"),
    ],
)
def test_bad_data_is_refused_and_the_network_stays_as_it_was(data, held_out, error, match):
    model, good = chain(2).train(), batches(2)
    before, blocks = state_of(model), removable_blocks(model, good[0][0])
    with pytest.raises(error, match=match):
        _score(model, _Lazy(data, good), _Lazy(held_out or (lambda d: d), good), blocks)
    assert_same(model, before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class _Lazy:
    """Minibatches that are made when they are gone through."""

    def __init__(self, make, data):
        self.make, self.data = make, data

    def __iter__(self):
        return iter(self.make(self.data))

    def __getitem__(self, index):
        return self.data[index]


def test_what_is_missing_is_said():
    model, data = chain(2), batches(2)
    blocks = removable_blocks(model, data[0][0])
    with pytest.raises(CriterionError, match="no block"):
        Imprinting().score(model, data[0][0], [], data, held_out=data)
    with pytest.raises(CriterionError, match="held_out, a part of the training set"):
        Imprinting().score(model, data[0][0], blocks, data)
    with pytest.raises(CriterionError, match="'1' twice"):
        Imprinting().score(model, data[0][0], [*blocks, blocks[0]], data, held_out=data)
    other = Block("9", "block", ("9.inside",), (6, 6, 6))
    with pytest.raises(CriterionError, match=r"no module '9\.inside'"):
        Imprinting().score(model, data[0][0], [other], data, held_out=data)
    for wrong in ({"target_length": 0}, {"num_classes": 1}):
        with pytest.raises(CriterionError, match="must be at least"):
            Imprinting(**wrong)


def test_number_of_classes_of_a_network_without_a_classifier():
    model, data = chain(2)[:-3], batches(3)  # its output are maps
    with pytest.raises(DataError, match="give num_classes"):
        _score(model, data)
    importance, gains = _score(model, data, num_classes=CLASSES)
    full, expected = _score(chain(2), data)
    assert gains == expected
    assert importance.classifier_accuracy is None
    assert full.classifier_accuracy is not None


def test_blocks_that_run_twice_or_never_are_refused():
    class Odd(nn.Module):
        def __init__(self, runs):
            super().__init__()
            self.block, self.runs, self.head = nn.Linear(6, 6), runs, nn.Linear(6, 2)

        def forward(self, x):
            for _ in range(self.runs):
                x = self.block(x)
            return self.head(x)

    data, block = [(torch.randn(4, 6), torch.arange(4) % 2)], Block("block", "block", ("block",), (6,))
    for runs, match in ((0, "did not run"), (2, "runs twice")):
        with pytest.raises(CriterionError, match=match):
            _score(Odd(runs), data, blocks=[block])
