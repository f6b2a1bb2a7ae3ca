"""Small networks of attention blocks: every layout of heads, tokens and windows that is found in the wild.

`Recipe.build()` makes a network of a convolutional stem, tokens, blocks and a classifier; `recipes()` is a hypothesis
strategy of them. Sizes are tiny; heads, widths and numbers of tokens all differ, so that no two are confused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from traced import drawn

F = nn.functional
SIDE, DIM = 4, 10  # of the map of tokens; width of the residual stream

STEMS = ("plain", "shuffle", "split-attention", "standardised", "squeeze-excite")
MIXERS = ("attention", "window", "token-mlp", "cosine", "channel-gate")
MLPS = ("plain", "glu", "swiglu", "convolution")
ENDS = ("mean", "class", "merged")


@dataclass(frozen=True)
class Attention_:
    """How an attention is written.

    Args:
        fused: By torch's own operator.
        one: Queries, keys and values from one layer, in any of the usual orders.
        order: Of `qkv` in that layer: `"3hd"` or `"h3d"`.
        norms: Queries and keys are normalised head by head.
        bias: A table of biases by relative position, one column a head.
        rotary: Positions are turned into queries and keys, by halves of a head.
    """

    fused: bool = False
    one: bool = True
    order: str = "3hd"
    norms: bool = False
    bias: bool = False
    rotary: bool = False


class Attention(nn.Module):
    """Attention of three heads of four positions, over tokens `[N, L, DIM]`."""

    def __init__(self, how: Attention_, length: int, heads: int = 3, head_dim: int = 4) -> None:
        super().__init__()
        self.how, self.num_heads, self.scale = how, heads, head_dim**-0.5
        inner = heads * head_dim
        if how.one:
            self.qkv = nn.Linear(DIM, 3 * inner)
        else:
            self.q, self.k, self.v = (nn.Linear(DIM, inner) for _ in range(3))
        if how.norms:
            self.q_norm, self.k_norm = nn.LayerNorm(head_dim), nn.LayerNorm(head_dim)
        if how.bias:
            self.table = nn.Parameter(torch.zeros(2 * length - 1, heads))
            places = torch.arange(length)
            self.register_buffer("index", places[:, None] - places[None] + length - 1, persistent=False)
        if how.rotary:
            angles = torch.outer(torch.arange(length), torch.tensor([1.0, 0.1])).repeat(1, 2)
            self.register_buffer("angles", angles, persistent=False)
        self.proj = nn.Linear(inner, DIM)

    def turned(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return x * self.angles.cos() + torch.cat([-other, one], -1) * self.angles.sin()

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        n, length, _ = x.shape
        if not self.how.one:
            return tuple(
                layer(x).view(n, length, self.num_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
        if self.how.order == "3hd":
            return self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.qkv(x).view(n, length, self.num_heads, 3, -1).permute(0, 2, 3, 1, 4).unbind(2)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.split(x)
        if self.how.norms:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.how.rotary:
            q, k = self.turned(q), self.turned(k)
        bias = self.table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1) if self.how.bias else None
        if self.how.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        else:
            scores = q * self.scale @ k.transpose(-2, -1)
            y = (scores if bias is None else scores + bias).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, length, -1))


class Window(nn.Module):
    """Attention within windows of a shifted map of tokens `[N, SIDE * SIDE, DIM]`."""

    def __init__(self, how: Attention_) -> None:
        super().__init__()
        self.attention = Attention(how, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, _, c = x.shape
        maps = x.view(n, SIDE, SIDE, c).roll((-1, -1), (1, 2))
        windows = maps.view(n, SIDE // 2, 2, SIDE // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.attention(windows).view(n, SIDE // 2, SIDE // 2, 2, 2, -1)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(n, SIDE, SIDE, -1)
        return y.roll((1, 1), (1, 2)).reshape(n, SIDE * SIDE, -1)


class Cosine(nn.Module):
    """Attention by cosines with a temperature for each head, whose biases a network computes."""

    def __init__(self, length: int, heads: int = 3) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(DIM, 12 * heads), nn.Linear(4 * heads, DIM)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.meta = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, heads, bias=False))
        where = torch.arange(length, dtype=torch.float64)
        places = torch.stack([where[:, None] - where[None], where[:, None] + where[None]], -1)
        self.register_buffer("places", places / length, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        scores = scores + 16 * torch.sigmoid(self.meta(self.places)).permute(2, 0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, -1))


class TokenMLP(nn.Module):
    """Mixes tokens, channel by channel."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(length, 7), nn.Linear(7, length)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)


class ChannelGate(nn.Module):
    """Gates channels by their mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x.mean(1, keepdim=True))) * self.value(x)


class MLP(nn.Module):
    """Two layers with something between them."""

    def __init__(self, kind: str, width: int = 6) -> None:
        super().__init__()
        self.kind = kind
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * width if kind == "glu" else width), nn.Linear(width, DIM)
        if kind == "swiglu":
            self.gate, self.norm = nn.Linear(DIM, width), nn.LayerNorm(width)
        if kind == "convolution":
            self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        if self.kind == "glu":
            one, other = y.chunk(2, -1)
            y = F.silu(one) * other
        elif self.kind == "swiglu":
            y = self.norm(F.silu(self.gate(x)) * y)
        elif self.kind == "convolution":
            y = F.gelu(self.conv(y.transpose(1, 2)).transpose(1, 2))
        else:
            y = F.gelu(y)
        return self.fc2(y)


class Block(nn.Module):
    """Mixes tokens, then channels, each beside a skip connection and scaled layer by layer."""

    def __init__(self, mixer: str, how: Attention_, mlp: str, length: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(DIM), nn.LayerNorm(DIM), MLP(mlp)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.ones(DIM))
        self.mixer: nn.Module = {
            "attention": lambda: Attention(how, length),
            "window": lambda: Window(how),
            "token-mlp": lambda: TokenMLP(length),
            "cosine": lambda: Cosine(length),
            "channel-gate": ChannelGate,
        }[mixer]()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.mixer(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised, with a gain of its own."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(width, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight) * self.gain, self.bias, padding=1)


class Stem(nn.Module):
    """From an image `[N, 3, 8, 8]` to tokens `[N, 16, DIM]`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        if kind == "split-attention":
            self.radix = nn.Conv2d(8, 12, 3, padding=1, groups=2)
            self.fc1, self.fc2 = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 12, 1)
        if kind == "squeeze-excite":
            self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        if kind == "standardised":
            self.middle = Standardised(8, 6)
        width = {"split-attention": 6, "standardised": 6}.get(kind, 8)
        self.patches = nn.Conv2d(width, DIM, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.kind == "shuffle":
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        elif self.kind == "split-attention":
            y = torch.relu(self.radix(x))
            n, c, h, w = y.shape
            parts = y.reshape(n, 2, c // 2, h, w)
            gate = self.fc2(torch.relu(self.fc1(parts.sum(1).mean((2, 3), keepdim=True))))
            x = (parts * gate.view(n, 2, c // 2, 1, 1).softmax(1)).sum(1)
        elif self.kind == "squeeze-excite":
            x = x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        elif self.kind == "standardised":
            x = torch.relu(self.middle(x))
        return self.patches(x).flatten(2).transpose(1, 2)


class Net(nn.Module):
    """A stem, positions, maybe a class token, blocks, maybe merged patches, and a classifier."""

    def __init__(self, stem: str, blocks: tuple[tuple[str, Attention_, str], ...], end: str) -> None:
        super().__init__()
        self.stem, self.end = Stem(stem), end
        length = SIDE * SIDE + (end == "class")
        self.positions = nn.Parameter(torch.zeros(1, length, DIM))
        if end == "class":
            self.token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.blocks = nn.Sequential(*(Block(mixer, how, mlp, length) for mixer, how, mlp in blocks))
        if end == "merged":
            self.merged, self.reduced = nn.LayerNorm(4 * DIM), nn.Linear(4 * DIM, 9, bias=False)
        width = 9 if end == "merged" else DIM
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.end == "class":
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.blocks(x + self.positions)
        if self.end == "merged":
            maps = x.unflatten(1, (SIDE, SIDE))
            parts = [maps[:, i::2, j::2] for j in range(2) for i in range(2)]
            x = self.reduced(self.merged(torch.cat(parts, -1))).flatten(1, 2)
        x = self.norm(x)
        return self.head(x[:, 0] if self.end == "class" else x.mean(1))


@dataclass(frozen=True)
class Recipe:
    """What a network is made of, and the seed of its weights."""

    stem: str
    blocks: tuple[tuple[str, Attention_, str], ...]
    end: str
    seed: int = 0

    def build(self) -> nn.Module:
        return drawn(Net(self.stem, self.blocks, self.end), self.seed)


def recipes() -> st.SearchStrategy[Recipe]:
    how = st.builds(
        Attention_, st.booleans(), st.booleans(), st.sampled_from(["3hd", "h3d"]), *[st.booleans() for _ in range(3)]
    )
    block = st.tuples(st.sampled_from(MIXERS), how, st.sampled_from(MLPS))
    # Windows are laid out on the map alone, without a class token.
    return st.builds(
        Recipe,
        st.sampled_from(STEMS),
        st.lists(block, min_size=1, max_size=2).map(tuple),
        st.sampled_from(ENDS),
        st.integers(0, 2**16),
    ).filter(lambda recipe: recipe.end != "class" or all(mixer != "window" for mixer, _, _ in recipe.blocks))
