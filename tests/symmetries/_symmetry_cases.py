"""Models whose scaling symmetries were reasoned by hand. Each comment says why, from the definition alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.symmetries._symmetry_case import Labelled, case, vectors


def chain(activation: nn.Module) -> nn.Module:
    """Two layers with biases and a head."""
    return nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, 6), activation, nn.Linear(6, 3))


@case
def relu() -> Labelled:
    """ReLU hands a factor on: of a layer with its bias to the next layer.

    Biases of later layers are added to what has that factor already, so they have to have it, too: scaling the
    first layer and its bias is undone in the weight of the second alone; that of the second and its bias in the
    head's. The head's bias stays.
    """
    return Labelled(
        chain(nn.ReLU()), vectors(), ("pair", "0.weight 0.bias 2.weight^-1"), ("pair", "2.weight 2.bias 4.weight^-1")
    )


@case
def gelu() -> Labelled:
    """GELU hands no factor on, and nothing else does."""
    return Labelled(chain(nn.GELU()), vectors())


class Squared(nn.Module):
    """Squared ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Of each entry."""
        return torch.relu(x) ** 2


@case
def squared() -> Labelled:
    """A factor a comes out as a², so the next weight has to take a⁻²: no pair of ones."""
    model = nn.Sequential(nn.Linear(5, 6, bias=False), Squared(), nn.Linear(6, 3))
    return Labelled(model, vectors(), ("rest", "0.weight 2.weight^-2"))


@case
def batch_norm() -> Labelled:
    """The paper's case.

    In front of BatchNorm a weight is scale-invariant and its bias does nothing. Gain and shift together give
    the next layer a factor, which the next BatchNorm takes away: a set. The last ones meet the head.
    """
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
    )
    return Labelled(
        model,
        vectors(),
        ("unit", "0.weight"),
        ("unit", "3.weight"),
        ("set", "1.weight 1.bias"),
        ("pair", "4.weight 4.bias 6.weight^-1"),
        inert="0.bias 3.bias",
    )


@case
def batch_norm_gelu() -> Labelled:
    """With GELU gain and shift say where its bend is: they are no set. Weights are scale-invariant all the same."""
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3))
    return Labelled(model, vectors(), ("unit", "0.weight"))


class Residual(nn.Module):
    """Two branches on a stream, normalized at the start of each, and at the end."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6, bias=False)
        self.norm1, self.in1, self.out1 = norm(), nn.Linear(6, 7), nn.Linear(7, 6)
        self.norm2, self.in2, self.out2 = norm(), nn.Linear(6, 7), nn.Linear(7, 6)
        self.last, self.head = norm(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Pre-norm."""
        x = self.embed(x)
        x = x + self.out1(torch.relu(self.in1(self.norm1(x))))
        x = x + self.out2(torch.relu(self.in2(self.norm2(x))))
        return self.head(self.last(x))


WRITERS = "embed.weight out1.weight out1.bias out2.weight out2.bias"
WITHIN = [("pair", f"in{i}.weight in{i}.bias out{i}.weight^-1") for i in (1, 2)]


@case
def pre_norm() -> Labelled:
    """Who writes to the stream is a set, biases included, as every reader normalizes it.

    In a branch ReLU hands the factor of the first layer to the second's weight. Gain and shift of a norm are
    undone by the weight that reads.
    """
    model = Residual(lambda: nn.LayerNorm(6))
    gains = [("pair", f"norm{i}.weight norm{i}.bias in{i}.weight^-1") for i in (1, 2)]
    return Labelled(
        model, vectors(), ("set", WRITERS), *WITHIN, *gains, ("pair", "last.weight last.bias head.weight^-1")
    )


class OnePlus(nn.Module):
    """RMSNorm with a gain of the form 1 + γ, as in Gemma."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        """Rows of mean square 1, times 1 + γ."""
        return x / x.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt() * (1 + self.weight)


class OnePlusNorm(OnePlus):
    """By its name a normalization."""


@case
def one_plus() -> Labelled:
    """As before, but a factor on the gain multiplies its 1 as well."""
    model = Residual(lambda: OnePlusNorm(6))
    gains = [("pair", f"1+norm{i}.weight in{i}.weight^-1") for i in (1, 2)]
    return Labelled(model, vectors(), ("set", WRITERS), *WITHIN, *gains, ("pair", "1+last.weight head.weight^-1"))


class Attention(nn.Module):
    """One head, causal."""

    def __init__(self, width: int = 6, *, fused: bool = False, normalized: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        if normalized:
            self.q_norm, self.k_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.o, self.head = nn.Linear(width, width, bias=False), nn.Linear(width, 3)
        self.fused, self.normalized = fused, normalized

    def forward(self, x: Tensor) -> Tensor:
        """Of sequences."""
        x = self.norm(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        if self.normalized:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.head(self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)))


def sequences() -> Tensor:
    """Two sequences of four positions."""
    return torch.randn(2, 4, 6)


@case
def attention() -> Labelled:
    """Queries against keys in the scores, v against o, o against the head behind it; a gain against its readers."""
    return Labelled(
        Attention(),
        sequences(),
        ("pair", "q.weight k.weight^-1"),
        ("pair", "v.weight o.weight^-1"),
        ("pair", "o.weight head.weight^-1"),
        ("pair", "norm.weight q.weight^-1 k.weight^-1 v.weight^-1"),
    )


@case
def fused_attention() -> Labelled:
    """The same of a fused weight with biases, whose thirds have exponents of their own.

    A key's bias adds the same to all scores of a query, which softmax does not see.
    """
    return Labelled(
        Attention(fused=True),
        sequences(),
        ("pair", "qkv.weight[0:6] qkv.bias[0:6] qkv.weight[6:12]^-1"),
        ("pair", "qkv.weight[12:18] qkv.bias[12:18] o.weight^-1"),
        ("pair", "o.weight head.weight^-1"),
        ("pair", "norm.weight qkv.weight[0:6]^-1 qkv.weight[6:12]^-1 qkv.weight[12:18]^-1"),
        inert="qkv.bias[6:12]",
    )


@case
def normalized_attention() -> Labelled:
    """With norms on q and k both are scale-invariant alone; their gains are a pair. The norm's gain is left to v."""
    return Labelled(
        Attention(normalized=True),
        sequences(),
        ("unit", "q.weight"),
        ("unit", "k.weight"),
        ("pair", "q_norm.weight k_norm.weight^-1"),
        ("pair", "v.weight o.weight^-1"),
        ("pair", "o.weight head.weight^-1"),
        ("pair", "norm.weight v.weight^-1"),
    )


@case
def gated() -> Labelled:
    """Of a gated layer up is linear, so it goes with down; the gate goes through SiLU, which hands no factor on."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(5, 7, bias=False), nn.Linear(5, 7, bias=False)
            self.down = nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    return Labelled(Gated(), vectors(), ("pair", "up.weight down.weight^-1"))


@case
def weight_norm() -> Labelled:
    """The direction is scale-invariant; the gain goes with the bias, against the head."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(6, 3))
    gain, direction = (f"0.parametrizations.weight.original{i}" for i in (0, 1))
    return Labelled(model, vectors(), ("unit", direction), ("pair", f"{gain} 0.bias 2.weight^-1"))


@case
def layer_scale() -> Labelled:
    """A branch with a gain per channel at its end (LayerScale), on a stream that is normalized at the end only.

    Who writes to the stream goes against nothing, as the norm takes it away, so embedding and gain are a set;
    within the branch the norm's gain, the weight and the gain at the end multiply each other.
    """

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, 6, bias=False)
            self.norm, self.mlp = nn.LayerNorm(6), nn.Linear(6, 6, bias=False)
            self.scale = nn.Parameter(torch.rand(6))
            self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(self.last(x + self.scale * self.mlp(self.norm(x))))

    return Labelled(
        Scaled(),
        vectors(),
        ("set", "embed.weight scale"),
        ("pair", "mlp.weight scale^-1"),
        ("pair", "norm.weight norm.bias mlp.weight^-1"),
        ("pair", "last.weight last.bias head.weight^-1"),
    )


@case
def experts() -> Labelled:
    """Soft mixture of two: the router's softmax has no factor; each expert has a pair of its own."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(5, 2)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)) for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            shares = self.router(x).softmax(dim=-1)
            return sum(s.unsqueeze(1) * e(x) for s, e in zip(shares.T, self.experts, strict=True))  # type: ignore[return-value]

    pairs = [("pair", f"experts.{i}.0.weight experts.{i}.2.weight^-1") for i in (0, 1)]
    return Labelled(Mixture(), vectors(), *pairs)
