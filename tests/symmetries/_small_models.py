"""Small networks of the kinds that people train, every eps negligible; and the loop that trains them by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_normreg import ReducedDecay

TINY = 1e-40
WIDTH, HEADS, WORDS, LENGTH = 8, 2, 11, 5
Numbers = Mapping[str, float]
Made = tuple[nn.Module, Tensor]


@dataclass(frozen=True)
class Kind:
    """What tells transformers apart."""

    layer_norm: bool = False  # else RMSNorm
    bias: bool = False
    fused: bool = False  # q, k and v are one weight
    gated: bool = False  # else GELU
    qk_norm: bool = False
    after: bool = False  # each branch is added before the norm, as in BERT
    tied: bool = False
    image: bool = False  # patches and a class token; else words


LLAMA = Kind(gated=True)
QWEN = Kind(gated=True, qk_norm=True)
GPT = Kind(layer_norm=True, bias=True, fused=True, tied=True)
VIT = Kind(layer_norm=True, bias=True, image=True)
BERT = Kind(layer_norm=True, bias=True, after=True, tied=True)


def norm_of(kind: Kind, size: int) -> nn.Module:
    """The kind's normalization."""
    return nn.LayerNorm(size, eps=TINY) if kind.layer_norm else nn.RMSNorm(size, eps=TINY)


class Block(nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, kind: Kind, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm1, self.norm2 = norm_of(kind, width), norm_of(kind, width)
        if kind.fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, kind.bias) for _ in range(3))
        if kind.qk_norm:
            self.q_norm, self.k_norm = (norm_of(kind, width // HEADS) for _ in range(2))
        self.o = nn.Linear(width, width, kind.bias)
        if kind.gated:
            self.gate = nn.Linear(width, 2 * width, kind.bias)
        self.up, self.down = nn.Linear(width, 2 * width, kind.bias), nn.Linear(2 * width, width, kind.bias)

    def attention(self, x: Tensor) -> Tensor:
        """Causal, but for images."""
        parts = self.qkv(x).chunk(3, dim=-1) if self.kind.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        if self.kind.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=not self.kind.image)
        return self.o(y.transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        """SwiGLU, or GELU."""
        up = self.up(x)
        return self.down(nn.functional.silu(self.gate(x)) * up if self.kind.gated else nn.functional.gelu(up))

    def forward(self, x: Tensor) -> Tensor:
        """Of a stream."""
        if self.kind.after:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.feed(x))
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Transformer(nn.Module):
    """A stream of blocks, from words or patches to logits."""

    def __init__(self, kind: Kind, *, depth: int = 1, width: int = WIDTH, words: int = WORDS) -> None:
        super().__init__()
        self.kind = kind
        if kind.image:
            self.patch = nn.Conv2d(1, width, 2, stride=2)
            self.token = nn.Parameter(torch.randn(1, 1, width))
        else:
            self.embed = nn.Embedding(words, width)
        if kind.layer_norm:
            self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(kind, width) for _ in range(depth))
        self.norm = norm_of(kind, width)  # of the stream at its end; in BERT of the embeddings
        self.head = nn.Linear(width, words, bias=kind.image)
        if kind.tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each position; of an image those at the class token."""
        if self.kind.image:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        else:
            x = self.embed(x)
        if self.kind.layer_norm:
            x = x + self.position.weight[: x.shape[1]]
        if self.kind.after:
            x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        if not self.kind.after:
            x = self.norm(x)
        return self.head(x[:, 0] if self.kind.image else x)


class ConvBlock(nn.Module):
    """Two convolutions with BatchNorm, beside a skip, as in ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(channels, eps=TINY) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The skip is added before ReLU."""
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def transformer(kind: Kind, depth: int = 1) -> Callable[[], Made]:
    """A transformer and a batch for it."""

    def make() -> Made:
        batch = torch.randn(4, 1, 4, 4) if kind.image else torch.arange(3 * LENGTH).reshape(3, LENGTH) * 7 % WORDS
        return Transformer(kind, depth=depth), batch

    return make


def batch_norm() -> Made:
    """The paper's case: layers, BatchNorm and ReLU in a chain."""
    blocks = [nn.Sequential(nn.Linear(size, 6, bias=False), nn.BatchNorm1d(6, eps=TINY), nn.ReLU()) for size in (5, 6)]
    return nn.Sequential(*blocks, nn.Linear(6, 3)), torch.randn(6, 5)


def resnet() -> Made:
    """One stage of two blocks."""
    stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=TINY), nn.ReLU())
    parts = {"stem": stem, "block1": ConvBlock(4), "block2": ConvBlock(4), "pool": nn.AdaptiveAvgPool2d(1)}
    model = nn.Sequential()
    for name, part in {**parts, "flat": nn.Flatten(), "head": nn.Linear(4, 3)}.items():
        model.add_module(name, part)
    return model, torch.randn(6, 2, 5, 5)


def matrices(model: nn.Module) -> list[str]:
    """What is usually decayed."""
    return [name for name, p in model.named_parameters() if p.squeeze().ndim > 1]


def everything(model: nn.Module) -> list[str]:
    """All of it."""
    return [name for name, _ in model.named_parameters()]


def later_matrices(model: nn.Module) -> list[str]:
    """Matrices without embeddings; where there is none, without the first."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = matrices(model)
    rest = [name for name in found if id(model.get_parameter(name)) not in tables]
    return rest if len(rest) < len(found) else found[1:]


def log_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy with labels in turn: it has no scale of its own."""
    logits = model(batch).flatten(0, -2)
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def spread(numbers: Numbers, name: str, like: Tensor, rest: float) -> Tensor:
    """One number for each row of a tensor, of whose parts it is told (``name[start:stop]``)."""
    rows = torch.full((len(like), *(1 for _ in like.shape[1:])), rest, dtype=like.dtype)
    for key, number in numbers.items():
        whole, _, part = key.partition("[")
        if whole == name:
            start, stop = map(int, part.rstrip("]").split(":")) if part else (0, len(like))
            rows[start:stop] = number
    return rows


def trained(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    kind: str,
    rates: Numbers,
    reduced: ReducedDecay | None = None,
    *,
    lr: float,
    steps: int,
) -> list[float]:
    """Losses of a run decayed by rates; in a reduced recipe what is remembered of gradients follows."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    memory = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named.items()}
    growth = {} if reduced is None else reduced.growth
    follows = {name: spread({n: math.exp(-g) for n, g in growth.items()}, name, p, 1.0) for name, p in named.items()}
    kept = {name: 1 - spread(rates, name, p, 0.0) for name, p in named.items()}
    losses = []
    for step in range(steps):
        loss = loss_of()
        losses.append(float(loss.detach()))
        lrs = {} if reduced is None else reduced.lr_factors(step, 2 if kind == "sgd" else 1)
        for (name, p), g in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            m, v = memory[name]
            if kind == "adamw":
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.99).addcmul_(g, g, value=0.01)
                update = m / (1 - 0.9 ** (step + 1)) / (v / (1 - 0.99 ** (step + 1))).sqrt().clamp_min(1e-200)
            elif kind == "lion":
                update = (0.9 * m + 0.1 * g).sign()
                m.mul_(0.99).add_(g, alpha=0.01)
            else:
                update = m.mul_(0.9).add_(g)
            with torch.no_grad():
                p.mul_(kept[name]).sub_(lr * spread(lrs, name, p, 1.0) * update)
            m.mul_(follows[name])
            v.mul_(follows[name] ** 2)
    return losses
