"""Transformers' blocks whose scaling symmetries were reasoned by hand, as in `_symmetry_cases`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetries._symmetry_case import Labelled, case, within

WIDTH, WORDS = 8, 9
PROJECTIONS = "attention.q.weight^-1 attention.k.weight^-1 attention.v.weight^-1"
Label = tuple[str, str]


def words(n: int = 2, length: int = 5) -> Tensor:
    """Sequences of words."""
    return torch.randint(WORDS, (n, length))


def linear(before: int = WIDTH, after: int = WIDTH, *, bias: bool = False) -> nn.Linear:
    """A layer without a bias, unless it is asked for."""
    return nn.Linear(before, after, bias=bias)


def turned(x: Tensor) -> Tensor:
    """Rotary positions, of pairs of neighbours, x of shape (…, positions, features)."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype).unsqueeze(1) / 3 ** torch.arange(x.shape[-1] // 2, dtype=x.dtype)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1).flatten(-2)


class _Attention(nn.Module):
    """Two heads; keys and values may come from somewhere else, be fewer, and turn with their position."""

    def __init__(self, *, bias: str = "", shared: int = 1, rotary: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.q, self.k = linear(bias="q" in bias), linear(after=WIDTH // shared, bias="k" in bias)
        self.v, self.o = linear(after=WIDTH // shared, bias="v" in bias), linear(bias="o" in bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(WIDTH) if norm else nn.Identity() for _ in range(2))
        self.rotary = rotary

    def forward(self, x: Tensor, memory: Tensor | None = None, positions: Tensor | float = 0.0) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(memory)), self.v(memory)
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q, k, v))
        k, v = (y.expand(-1, q.shape[1], -1, -1) for y in (k, v))
        if self.rotary:
            q, k = turned(q), turned(k)
        scores = q @ k.transpose(-1, -2) + positions
        return self.o((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(-2))


class _Gated(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(after=hidden), linear(after=hidden), linear(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Plain(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, activation: Callable[[Tensor], Tensor], *, bias: bool) -> None:
        super().__init__()
        self.up, self.down = linear(after=12, bias=bias), linear(12, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class _Block(nn.Module):
    """Pre-norm."""

    def __init__(self, norm: Callable[[int], nn.Module], attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = norm(WIDTH), attention
        self.norm2, self.mlp = norm(WIDTH), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def model_of(block: nn.Module, last: nn.Module) -> nn.Module:
    """Words, one block, and words again."""
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), block, last, linear(after=WORDS))


def biased(prefix: str = "1.") -> list[Label]:
    """Attention with all biases: those of q and v have the factor of their weight.

    That of k adds the same to all scores of a query, and softmax does not see it.
    """
    return [
        ("pair", within(f"{prefix}attention.", "q.weight q.bias k.weight^-1")),
        ("pair", within(f"{prefix}attention.", "v.weight v.bias o.weight^-1")),
    ]


@case
def grouped_queries() -> Labelled:
    """Two heads that share one of keys and values, biases on q, k, v, and rotary positions, as in Qwen 2.

    Positions turn the bias of k, so scores of different keys differ by it: it is live, and shares the factor of k's
    weight. The bias of o is missing, so embedding, o and down are who writes. Each norm's gain is undone in its
    readers' weights; the readers' biases come after.
    """
    block = _Block(nn.RMSNorm, _Attention(bias="qkv", shared=2, rotary=True), _Gated())
    return Labelled(
        model_of(block, nn.RMSNorm(WIDTH)),
        words(),
        ("pair", within("1.attention.", "q.weight q.bias k.weight^-1 k.bias^-1")),
        ("pair", within("1.attention.", "v.weight v.bias o.weight^-1")),
        ("pair", "1.mlp.up.weight 1.mlp.down.weight^-1"),
        ("set", "0.weight 1.attention.o.weight 1.mlp.down.weight"),
        ("pair", within("1.", f"norm1.weight {PROJECTIONS}")),
        ("pair", within("1.", "norm2.weight mlp.gate.weight^-1 mlp.up.weight^-1")),
        ("pair", "2.weight 3.weight^-1"),
    )


class _Experts(nn.Module):
    """Of three gated experts the two that the router prefers, each with its share."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = linear(after=3), nn.ModuleList(_Gated(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        best, which = self.router(x).topk(2, dim=-1)
        shares = torch.zeros_like(x[..., :3]).scatter(-1, which, best.softmax(dim=-1))
        return sum(shares[..., i, None] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


@case
def mixture_of_experts() -> Labelled:
    """A block with one SwiGLU layer, then one with the two best of three, which only the order of logits decides.

    Shares are a softmax, so the router has no factor of its own. Each expert has a pair inside, and writes to the
    stream with the others. The norm in front is read by the router, and by gate and up of each expert.
    """
    blocks = [_Block(nn.RMSNorm, _Attention(), mlp) for mlp in (_Gated(), _Experts())]
    readers = " ".join(f"mlp.experts.{i}.{what}.weight^-1" for i in range(3) for what in ("gate", "up"))
    downs = " ".join(f"2.mlp.experts.{i}.down.weight" for i in range(3))
    return Labelled(
        nn.Sequential(nn.Embedding(WORDS, WIDTH), *blocks, nn.RMSNorm(WIDTH), linear(after=WORDS)),
        words(),
        *(("pair", within(f"{i}.attention.", "q.weight k.weight^-1")) for i in (1, 2)),
        *(("pair", within(f"{i}.attention.", "v.weight o.weight^-1")) for i in (1, 2)),
        *(("pair", within(f"{i}.", f"norm1.weight {PROJECTIONS}")) for i in (1, 2)),
        ("pair", within("1.", "norm2.weight mlp.gate.weight^-1 mlp.up.weight^-1")),
        ("pair", within("1.mlp.", "up.weight down.weight^-1")),
        *(("pair", within(f"2.mlp.experts.{i}.", "up.weight down.weight^-1")) for i in range(3)),
        ("pair", within("2.", f"norm2.weight mlp.router.weight^-1 {readers}")),
        ("set", f"0.weight 1.attention.o.weight 1.mlp.down.weight 2.attention.o.weight {downs}"),
        ("pair", "3.weight 4.weight^-1"),
    )


class _Parallel(nn.Module):
    """Attention and feed-forward layer side by side, behind a norm each or one for both."""

    def __init__(self, *, norms: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        if norms == 2:
            self.norm2 = nn.LayerNorm(WIDTH)
        self.attention, self.mlp = _Attention(bias="qkvo"), _Plain(F.gelu, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        z = self.norm2(x) if hasattr(self, "norm2") else y
        return x + self.attention(y) + self.mlp(z)


PARALLEL: list[Label] = [
    *biased(),
    ("set", "0.weight 1.attention.o.weight 1.attention.o.bias 1.mlp.down.weight 1.mlp.down.bias"),
    ("pair", "2.weight 2.bias 3.weight^-1"),
]


@case
def parallel_branches() -> Labelled:
    """As in GPT-NeoX: both branches read and write the same stream, so the writers are those of a sequence of two.

    Gain and shift of each norm go with its own readers: q, k and v, or the layer up, whose bias stays (GELU).
    """
    return Labelled(
        model_of(_Parallel(norms=2), nn.LayerNorm(WIDTH)),
        words(),
        *PARALLEL,
        ("pair", within("1.", f"norm1.weight norm1.bias {PROJECTIONS}")),
        ("pair", within("1.", "norm2.weight norm2.bias mlp.up.weight^-1")),
        inert="1.attention.k.bias",
    )


@case
def parallel_branches_with_one_norm() -> Labelled:
    """As in GPT-J: the one gain and shift go with the readers of both branches."""
    return Labelled(
        model_of(_Parallel(norms=1), nn.LayerNorm(WIDTH)),
        words(),
        *PARALLEL,
        ("pair", within("1.", f"norm1.weight norm1.bias {PROJECTIONS} mlp.up.weight^-1")),
        inert="1.attention.k.bias",
    )


class _Relative(nn.Module):
    """Two blocks with one table of relative positions, and the embedding as head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Embedding(WORDS, WIDTH), nn.Embedding(9, 2)
        self.blocks = nn.ModuleList(_Block(nn.RMSNorm, _Attention(), _Plain(F.relu, bias=False)) for _ in range(2))
        self.last = nn.RMSNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x, places = self.embed(ids), torch.arange(ids.shape[1])
        positions = self.table(places.unsqueeze(1) - places + 4).movedim(-1, 0)
        for block in self.blocks:
            x = x + block.attention(block.norm1(x), positions=positions)
            x = x + block.mlp(block.norm2(x))
        return self.last(x) @ self.embed.weight.T


@case
def relative_positions() -> Labelled:
    """As the encoder of T5, with the embedding as head: scores are sums of products of q and k and of a table.

    The products have to stay beside the table, which has no factor, and does not need one for q against k. As the
    writers' factor is in the head, too, the last gain undoes it.
    """
    blocks = [
        ("pair", within(f"blocks.{i}.", exponents))
        for i in (0, 1)
        for exponents in (
            "attention.q.weight attention.k.weight^-1",
            "attention.v.weight attention.o.weight^-1",
            f"norm1.weight {PROJECTIONS}",
            "mlp.up.weight mlp.down.weight^-1",
            "norm2.weight mlp.up.weight^-1",
        )
    ]
    writers = " ".join(within(f"blocks.{i}.", "attention.o.weight mlp.down.weight") for i in (0, 1))
    return Labelled(_Relative(), words(), *blocks, ("pair", f"embed.weight {writers} last.weight^-1"))


class _Patches(nn.Module):
    """Patches behind a class token, each at its place."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.block = _Block(nn.LayerNorm, _Attention(bias="qkvo"), _Plain(F.gelu, bias=True))
        self.last, self.head = nn.LayerNorm(WIDTH), linear(after=3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.place
        return self.head(self.last(self.block(x))[:, 0])


@case
def vision_transformer() -> Labelled:
    """Patches with their bias, class token, places and both branches are added up to a stream that norms read: a set.

    Tokens and places are zero at the start, but symmetries are asked for at other weights. Only the class token is
    read, which all others reach by attention.
    """
    return Labelled(
        _Patches(),
        torch.randn(6, 3, 4, 4),
        *biased("block."),
        (
            "set",
            "patch.weight patch.bias token place block.attention.o.weight block.attention.o.bias "
            "block.mlp.down.weight block.mlp.down.bias",
        ),
        ("pair", within("block.", f"norm1.weight norm1.bias {PROJECTIONS}")),
        ("pair", within("block.", "norm2.weight norm2.bias mlp.up.weight^-1")),
        ("pair", "last.weight last.bias head.weight^-1"),
        inert="block.attention.k.bias",
    )
