"""Embeddings: their lengths by the rule, whatever form an output has, and the points where they are taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nni_plugin.errors import CriterionError
from nni_plugin.layers import Block
from nni_plugin.layers.embedding import Embedder, is_channels_last, pooled_size, pooling_matrix
from nni_plugin.layers.points import StreamPoints

CONV, LINEAR = nn.Conv2d(6, 6, 3), nn.Linear(6, 24)


@pytest.mark.parametrize(
    ("length", "channels", "side"),
    [(512, 64, 3), (512, 128, 2), (512, 256, 1), (512, 512, 1), (2048, 16, 11), (2048, 32, 8), (2048, 64, 6)],
)
def test_sizes_of_the_papers_networks(length, channels, side):
    assert pooled_size(channels, (64, 64), length) == (side, side)


def test_sizes_at_the_ends_of_the_rule():
    assert pooled_size(9000, (7, 7), 2048) == (1, 1)  # where the rule alone gives none
    assert pooled_size(16, (8, 5), 2048) == (8, 5)  # never more than there is
    assert pooled_size(32, (40, 40), 200) == (2, 2)  # 2.5 is rounded to even
    assert pooled_size(768, (197,), 2048) == (3,)
    assert pooled_size(8, (16, 16, 16), 2048) == (6, 6, 6)
    assert pooled_size(8, (), 2048) == ()


@pytest.mark.parametrize(
    ("places", "size"), [((7,), (3,)), ((9, 5), (4, 5)), ((6, 5, 4), (2, 3, 1)), ((16, 16), (8, 8))]
)
def test_pooling_by_a_matrix_is_torchs(places, size):
    maps = torch.randn(2, 3, *places, dtype=torch.float64)
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(places) - 1]
    found = maps.flatten(2) @ pooling_matrix(places, size)
    assert torch.allclose(found, pool(maps, size).flatten(2), atol=1e-12)


@pytest.mark.parametrize("length", [20, 60, 1000, 5000])  # by a matrix, by torch's kernel, and as it is
def test_forms_of_one_map_give_one_vector(length):
    maps = torch.randn(4, 6, 12, 13, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(maps, pooled_size(6, (12, 13), length)).flatten(1)
    first, last = Embedder([CONV], length), Embedder([LINEAR, nn.LayerNorm(6)], length)
    for _ in range(2):
        assert torch.allclose(first(maps, 4), expected, atol=1e-12)
        assert torch.allclose(last(maps.movedim(1, -1), 4), expected, atol=1e-12)
    tokens, sequence = maps.flatten(2).transpose(1, 2), Embedder([nn.Conv1d(6, 6, 1)], length)
    assert torch.allclose(Embedder([LINEAR], length)(tokens, 4), sequence(maps.flatten(2), 4), atol=1e-12)


def test_vectors_and_half_precision():
    vectors = torch.randn(4, 6)
    assert torch.equal(Embedder([LINEAR], 2048)(vectors, 4), vectors)
    halves = Embedder([CONV], 20)(torch.randn(4, 6, 8, 8).bfloat16(), 4)
    assert halves.dtype == torch.float32


def test_windows_of_a_sample_are_averaged():
    windows = torch.randn(4 * 3, 5, 6, dtype=torch.float64)
    expected = windows.unflatten(0, (4, 3)).mean((1, 2))
    assert torch.allclose(Embedder([LINEAR], 6)(windows, 4), expected, atol=1e-12)


def test_where_channels_are():
    assert not is_channels_last([CONV, LINEAR], (2, 6, 8, 6))  # a convolution knows best
    assert is_channels_last([LINEAR], (2, 8, 8, 6))
    assert is_channels_last([nn.LayerNorm(6)], (2, 8, 8, 6))
    assert not is_channels_last([], (2, 6, 8, 8))
    assert is_channels_last([], (2, 8, 6))
    assert not is_channels_last([nn.Conv1d(6, 8, 1)], (2, 8, 6))


@pytest.mark.parametrize("shape", [(4, 1, 1, 1, 1, 1), (5, 6, 8, 8), (4,)])
def test_outputs_that_hold_no_samples_are_refused(shape):
    with pytest.raises(CriterionError, match="4 samples as rows"):
        Embedder([], 20)(torch.zeros(shape), 4)


class Tokens(nn.Module):
    """Branches around a stream of tokens `[N, 4, 6]`: one over transposed tokens, one over windows of two."""

    def __init__(self, form):
        super().__init__()
        self.form, self.norm = form, nn.LayerNorm(6)
        self.work = nn.Linear(4, 4) if form == "transposed" else nn.Linear(6, 6)

    def forward(self, x):
        normed = self.norm(x)
        if self.form == "transposed":
            return x + self.work(normed.transpose(1, 2)).transpose(1, 2)
        return x + self.work(normed.reshape(-1, 2, 6)).reshape(x.shape)


@pytest.mark.parametrize(("form", "shape"), [("transposed", (6, 4)), ("windows", (2, 6))])
def test_the_stream_behind_a_branch_of_another_form(form, shape):
    model = Tokens(form).double().eval()
    points = StreamPoints(model, [Block("work", "branch", ("norm", "work"), shape)], 12, stem=True)
    seen, x = {}, torch.randn(3, 4, 6, dtype=torch.float64)
    with torch.no_grad(), points.watch(seen.__setitem__):
        points.expect(3, x)
        after = model(x)
        points.check_visited()
    left = 2 if form == "transposed" else 1
    for point, stream in ((0, after), (1, x)):
        expected = F.adaptive_avg_pool1d(stream.transpose(1, 2), left).flatten(1)
        assert torch.allclose(seen[point], expected, atol=1e-12)
    assert points.before == [1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_in_a_row_share_the_point_between_them():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
    blocks = [Block(name, "block", (name,), (6,)) for name in ("0", "1", "3")]
    for stem, before, count in ((False, [None, 0, 3], 4), (True, [3, 0, 4], 5)):
        points = StreamPoints(model, blocks, 12, stem=stem)
        for _ in range(2):
            with torch.no_grad(), points.watch(lambda *_: None):
                points.expect(2, x := torch.randn(2, 6))
                model(x)
                points.check_visited()
        assert points.before == before  # the activation changes the second one's output in place: another signal
        assert points.count == count
