"""The episodic memory: what is merged, what is drawn, what is refused, and that it owns what it holds."""

import pytest
import torch

from nni_plugin.errors import SearchError
from nni_plugin.performance import EpisodicMemory

STEPS = [(0, 0.1), (1, 0.3), (2, 0.5), (3, 0.5), (4, 0.7), (5, 0.7), (6, 0.9), (7, 0.5), (8, 0.0)]


def filled(steps=STEPS, capacity: int = 3, **options) -> EpisodicMemory:
    memory = EpisodicMemory(capacity, **options)
    for architecture, accuracy in steps:
        memory.add(torch.tensor([float(architecture)], dtype=torch.float64), accuracy)
    return memory


def test_the_vector_of_the_catalogue() -> None:
    memory = filled()
    assert memory.accuracies.tolist() == pytest.approx([0.2, 0.5, 0.7], abs=1e-15)
    assert memory.architectures.flatten().tolist() == [0.5, 2.5, 5.5]
    assert len(memory) == 3


def test_it_never_grows_beyond_its_capacity() -> None:
    generator = torch.Generator().manual_seed(0)
    memory = EpisodicMemory(5, average=1)
    for step in range(40):
        memory.add(torch.rand(4, generator=generator), float(torch.rand(1, generator=generator)))
        assert len(memory) == min(step + 1, 5)
    assert memory.architectures.shape == (5, 4)


def test_the_key_is_the_accuracy() -> None:
    """The nearest accuracy is averaged with, however far its architecture is; the others stay as they were."""
    memory = filled([(0, 0.1), (10, 0.9), (0, 0.8)], capacity=2, average=1)
    assert memory.accuracies.tolist() == pytest.approx([0.1, 0.85])
    assert memory.architectures.flatten().tolist() == [0, 5]


def test_bins_in_use_have_equal_mass() -> None:
    accuracies = [0.0, 0.01, 0.02, 0.03, 0.5, 0.51, 1.0]
    memory = filled([(i, accuracy) for i, accuracy in enumerate(accuracies)], capacity=10, average=1)
    weights = memory.weights()
    assert weights.sum() == pytest.approx(1)
    for part in (slice(0, 4), slice(4, 6), slice(6, 7)):  # the largest lies in the last bin, not beyond it
        assert float(weights[part].sum()) == pytest.approx(1 / 3)
        assert weights[part].unique().numel() == 1
    drawn, accuracies_drawn = memory.sample(6000, torch.Generator().manual_seed(0))
    assert float((drawn == 6).double().mean()) == pytest.approx(1 / 3, abs=0.02)
    assert accuracies_drawn.dtype == drawn.dtype
    assert torch.equal(torch.tensor(accuracies, dtype=torch.float64)[drawn.flatten().long()], accuracies_drawn)


def test_equal_accuracies_are_one_bin() -> None:
    memory = filled([(i, 0.5) for i in range(4)], capacity=10, average=1)
    assert memory.weights().tolist() == [0.25] * 4


def test_entries_are_copies() -> None:
    memory = EpisodicMemory(2)
    architecture = torch.zeros(3)
    memory.add(architecture, 0.5)
    architecture += 2
    memory.add(architecture, 0.5)
    assert memory.architectures.tolist() == [[1, 1, 1]]
    state = memory.state_dict()
    for _ in range(5):
        memory.add(torch.ones(3), 0.5)
    assert state["architectures"].tolist() == [[1, 1, 1]]


def test_it_goes_on_as_if_nothing_had_happened() -> None:
    """Saved at every point, also with half an entry pending."""
    for at in range(len(STEPS)):
        first = filled(STEPS[:at])
        second = EpisodicMemory(3)
        second.load_state_dict(first.state_dict())
        for architecture, accuracy in STEPS[at:]:
            second.add(torch.tensor([float(architecture)], dtype=torch.float64), accuracy)
        assert torch.equal(second.accuracies, filled().accuracies)
        assert torch.equal(second.architectures, filled().architectures)
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        pairs = zip(second.sample(5, generators[0]), filled().sample(5, generators[1]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_it_goes_where_the_search_is() -> None:
    """A state is read back onto the CPU."""
    saved, memory = filled(STEPS[:5]).state_dict(), EpisodicMemory(3)
    assert saved["pending"]
    memory.load_state_dict(saved, "meta")
    assert {memory.sample(2)[0].device.type, *(gates.device.type for gates, _ in memory._pending)} == {"meta"}


def test_holds_tells_known_architectures() -> None:
    memory = filled(STEPS[:2], average=1)
    assert memory.holds(torch.tensor([1.0]))
    assert not memory.holds(torch.tensor([0.5]))
    assert not EpisodicMemory().holds(torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("accuracy", "text"), [(93.1, "Percent"), (-0.1, "between 0 and 1"), (float("nan"), "between 0 and 1")]
)
def test_accuracies_that_are_no_fraction_are_refused(accuracy: float, text: str) -> None:
    with pytest.raises(SearchError, match=text):
        EpisodicMemory().add(torch.ones(2), accuracy)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(SearchError, match="not finite"):
        EpisodicMemory().add(torch.tensor([float("nan")]), 0.5)
    with pytest.raises(SearchError, match="empty"):
        EpisodicMemory().sample(2)
    for name in ("capacity", "average", "bins"):
        with pytest.raises(SearchError, match=name):
            EpisodicMemory(**{name: 0})
    with pytest.raises(SearchError, match="3 entries, this one holds 2"):
        EpisodicMemory(2).load_state_dict(filled().state_dict())
