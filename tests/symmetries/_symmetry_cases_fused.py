"""Fused weights of parts that differ in size, whose scaling symmetries were reasoned by hand."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetries._symmetry_case import Labelled, case, within
from tests.symmetries._symmetry_cases_attention import WIDTH, Label, _Block, linear, model_of, turned, words


class _FusedAttention(nn.Module):
    """As in Phi-3: two heads of queries (8 rows) share one of keys and one of values (4 rows each)."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.qkv, self.o = linear(after=16), linear()
        self.q_norm, self.k_norm = (nn.RMSNorm(4) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([8, 4, 4], dim=-1)
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q, k, v))
        q, k = turned(self.q_norm(q)), turned(self.k_norm(k))
        k, v = (y.expand(-1, 2, -1, -1) for y in (k, v))
        return self.o(((q @ k.transpose(-1, -2)).softmax(dim=-1) @ v).transpose(1, 2).flatten(-2))


class _FusedGate(nn.Module):
    """SwiGLU with one weight: the first half of the rows is the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = linear(after=20), linear(10)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def _labels(readers: str) -> list[Label]:
    """What both have: v with o, up with down, gains with what reads them, and the writers of the stream."""
    return [
        ("pair", within("1.attention.", "qkv.weight[12:16] o.weight^-1")),
        ("pair", within("1.mlp.", "gate_up.weight[10:20] down.weight^-1")),
        ("pair", f"1.norm1.weight {within('1.attention.', readers)}"),
        ("pair", within("1.", "norm2.weight mlp.gate_up.weight[0:10]^-1 mlp.gate_up.weight[10:20]^-1")),
        ("set", "0.weight 1.attention.o.weight 1.mlp.down.weight"),
        ("pair", "2.weight 3.weight^-1"),
    ]


@case
def fused_parts_of_two_sizes() -> Labelled:
    """Queries against keys, values against o; the norm is read by all three. Gate and up as where they are apart."""
    model = model_of(_Block(nn.RMSNorm, _FusedAttention(norm=False), _FusedGate()), nn.RMSNorm(WIDTH))
    return Labelled(
        model,
        words(),
        ("pair", within("1.attention.", "qkv.weight[0:8] qkv.weight[8:12]^-1")),
        *_labels("qkv.weight[0:8]^-1 qkv.weight[8:12]^-1 qkv.weight[12:16]^-1"),
    )


@case
def fused_parts_with_norms() -> Labelled:
    """With norms behind them queries and keys are scale-invariant, together one part; the norm in front is left to v.

    The gains of both norms multiply each other in the scores.
    """
    model = model_of(_Block(nn.RMSNorm, _FusedAttention(norm=True), _FusedGate()), nn.RMSNorm(WIDTH))
    return Labelled(
        model,
        words(),
        ("unit", "1.attention.qkv.weight[0:12]"),
        ("pair", within("1.attention.", "q_norm.weight k_norm.weight^-1")),
        *_labels("qkv.weight[12:16]^-1"),
    )
