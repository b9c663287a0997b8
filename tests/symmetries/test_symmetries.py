"""All scaling symmetries of a loss, against bases that were reasoned by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normreg import Symmetries, find_symmetries

Basis = set[tuple[str, frozenset[tuple[str, int]]]]


def told(kind: str, exponents: str) -> tuple[str, frozenset[tuple[str, int]]]:
    """A symmetry as it is written in the labels: ``"pair", "q k^-1"``."""
    powers = (word.partition("^") for word in exponents.split())
    return kind, frozenset((name, int(power or 1)) for name, _, power in powers)


def found(model: nn.Module, batch: Any, loss: Callable[..., Tensor], seed: int = 0) -> Symmetries:
    """What is found, checked by what says by itself whether to believe it."""
    model.train()
    symmetries = find_symmetries(model, batch, forward=loss, seed=seed, layers="apart")
    # Roundoff against what the points make of it: the gap is that of the facts, seven orders at least.
    assert symmetries.largest < 1e-13
    assert symmetries.smallest > 1e-4
    assert symmetries.certificate < 1e-12
    return symmetries


def basis_of(symmetries: Symmetries) -> Basis:
    """The basis as a set."""
    return {(s.kind, frozenset(s.exponents.items())) for s in symmetries.basis}


class Labelled:
    """A model, a batch for it, and what is expected: symmetries, and tensors that do not reach the loss."""

    def __init__(self, model: nn.Module, batch: Any, *labels: tuple[str, str], inert: str = "") -> None:
        self.model, self.batch = model, batch
        self.labels = {told(*label) for label in labels}
        self.inert = tuple(inert.split())


def log_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy with labels in turn: it has no scale of its own."""
    logits = model(batch).flatten(0, -2)
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def vectors() -> Tensor:
    """Six samples of five numbers."""
    return torch.randn(6, 5)


def chain(activation: nn.Module) -> nn.Module:
    """Two layers with biases and a head."""
    return nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, 6), activation, nn.Linear(6, 3))


def relu() -> Labelled:
    """ReLU hands a factor on: of a layer with its bias to the next layer.

    Biases of later layers are added to what has that factor already, so they have to have it, too: scaling the
    first layer and its bias is undone in the weight of the second alone; that of the second and its bias in the
    head's. The head's bias stays.
    """
    return Labelled(
        chain(nn.ReLU()), vectors(), ("pair", "0.weight 0.bias 2.weight^-1"), ("pair", "2.weight 2.bias 4.weight^-1")
    )


def gelu() -> Labelled:
    """GELU hands no factor on, and nothing else does."""
    return Labelled(chain(nn.GELU()), vectors())


class Squared(nn.Module):
    """Squared ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Of each entry."""
        return torch.relu(x) ** 2


def squared() -> Labelled:
    """A factor a comes out as a², so the next weight has to take a⁻²: no pair of ones."""
    model = nn.Sequential(nn.Linear(5, 6, bias=False), Squared(), nn.Linear(6, 3))
    return Labelled(model, vectors(), ("rest", "0.weight 2.weight^-2"))


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


def weight_norm() -> Labelled:
    """The direction is scale-invariant; the gain goes with the bias, against the head."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(6, 3))
    gain, direction = (f"0.parametrizations.weight.original{i}" for i in (0, 1))
    return Labelled(model, vectors(), ("unit", direction), ("pair", f"{gain} 0.bias 2.weight^-1"))


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


CASES: list[Callable[[], Labelled]] = [
    relu, gelu, squared, batch_norm, batch_norm_gelu, pre_norm, one_plus, attention, fused_attention,
    normalized_attention, gated, weight_norm, layer_scale, experts,
]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bases_reasoned_by_hand(case: Callable[[], Labelled], seed: int) -> None:
    """Kinds, exponents and what is inert; for points of any seed."""
    torch.manual_seed(seed)
    labelled = case()
    symmetries = found(labelled.model, labelled.batch, log_loss, seed)
    expected = {(kind, frozenset((n.replace("1+", "1 + "), p) for n, p in powers)) for kind, powers in labelled.labels}
    assert basis_of(symmetries) == expected
    assert symmetries.inert == labelled.inert


@pytest.mark.parametrize("case", [pre_norm, batch_norm, fused_attention], ids=lambda case: case.__name__)
def test_the_users_own_model_has_them(case: Callable[[], Labelled]) -> None:
    """At its own weights, in float64 and training mode: multiplied by 1.7^c the loss stays to what eps is worth.

    An eps of 1e-5 beside a variance s moves it by a share of 1e-5/s; here variances are above 1e-2.
    """
    torch.manual_seed(3)
    labelled = case()
    model = labelled.model.double()
    batch = labelled.batch.double()
    symmetries = found(model, labelled.batch, log_loss)
    before = log_loss(model, batch).item()
    for symmetry in symmetries.basis:
        with torch.no_grad():
            for name, power in symmetry.exponents.items():
                tensor, _, part = name.partition("[")
                weight = model.get_parameter(tensor)
                start, stop = map(int, part.rstrip("]").split(":")) if part else (0, len(weight))
                weight[start:stop] *= 1.7**power
        assert log_loss(model, batch).item() == pytest.approx(before, rel=1e-3)


class Deep(nn.Module):
    """A stream with branches as of :class:`Residual`, and a mixture of gated experts in each."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(6),
                    "router": nn.Linear(6, 2),
                    "experts": nn.ModuleList(
                        nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 6)) for _ in range(2)
                    ),
                }
            )
            for _ in range(depth)
        )
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Pre-norm."""
        x = self.embed(x)
        for block in self.blocks:
            y = block["norm"](x)
            shares = block["router"](y).softmax(dim=-1).T
            x = x + sum(s.unsqueeze(1) * e(y) for s, e in zip(shares, block["experts"], strict=True))
        return self.head(self.last(x))


def test_layers_together_are_as_apart() -> None:
    """The same basis at a cost that does not grow with the depth; experts are parted within their layer."""
    passes = set()
    for depth in (2, 4):
        torch.manual_seed(depth)
        model = Deep(depth).train()
        apart, together = (
            find_symmetries(model, vectors(), forward=log_loss, layers=how) for how in ("apart", "together")
        )
        assert basis_of(together) == basis_of(apart)
        assert together.tensors == apart.tensors
        assert together.certificate < 1e-12
        # One set (embedding, second layers with their biases); of each expert a pair, as of each norm with its readers.
        assert len(together.basis) == 1 + depth * (2 + 1) + 1
        passes.add(together.passes)
    assert len(passes) == 1
    assert max(passes) < 40


def test_a_matrix_of_exponents() -> None:
    """As many columns as symmetries, as many rows as tensors; a sentence for each."""
    torch.manual_seed(0)
    labelled = relu()
    symmetries = found(labelled.model, labelled.batch, log_loss)
    matrix = symmetries.matrix()
    assert matrix.shape == (6, 2)
    assert symmetries.tensors == tuple(f"{i}.{what}" for i in (0, 2, 4) for what in ("weight", "bias"))
    assert matrix[:, 0].tolist() == [1, 1, -1, 0, 0, 0]
    assert str(symmetries.basis[0]) == (
        "Multiplying 0.weight, 0.bias by a and 2.weight by 1/a changes nothing, also in each of 6 blocks of slices."
    )
    assert math.isfinite(symmetries.certificate)


def test_what_cannot_be_asked() -> None:
    """In words, before anything is computed."""
    model = nn.Linear(2, 2).requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="`module` must have parameters that are trained, but all are frozen"):
        find_symmetries(model, torch.randn(3, 2), forward=lambda m, x: m(x).sum())
    with pytest.raises(ValueError, match="`layers` must be 'auto', 'apart' or 'together', got 'all'"):
        find_symmetries(nn.Linear(2, 2), torch.randn(3, 2), forward=lambda m, x: m(x).sum(), layers="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training mode"):
        find_symmetries(nn.Linear(2, 2).eval(), torch.randn(3, 2), forward=lambda m, x: m(x).sum())


DIMENSIONS = {
    # Per layer of two: q/k, v/o, up/down, a gain with q, k, v, another with gate and up. Once: who writes to the stream
    # (embedding, both o, both down), and the last gain with the head.
    "llama": 5 * 2 + 2,
    # q and k alone, their gains, v/o, the gain with v, up/down, the gain with gate and up; once the same two.
    "qwen3": 7 * 2 + 2,
    # q/k, v/o, gain and shift with qkv, and with the first layer of the MLP (GELU: no pair inside); once: the stream's
    # writers, which take the tied head along, against the last gain and shift.
    "gpt2": 4 * 2 + 1,
    # The same with the patch embedding, places and class token among the writers, and a head of its own.
    "vit": 4 * 2 + 2,
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_models_of_transformers(name: str) -> None:
    """As many as by hand, none false (the certificate) and none missed (the gap)."""
    cases = pytest.importorskip("tests.symmetries._transformers_cases")
    torch.manual_seed(0)
    case = getattr(cases, name)()
    symmetries = found(case.model, case.batch, cases.own_loss)
    assert len(symmetries.basis) == DIMENSIONS[name]
    together = find_symmetries(case.model, case.batch, forward=cases.own_loss, layers="together")
    assert basis_of(together) == basis_of(symmetries)
    assert together.passes < symmetries.passes
    assert {s.kind for s in symmetries.basis} <= {"unit", "set", "pair"}
    sets = [s for s in symmetries.basis if s.kind == "set"]
    if name in ("llama", "qwen3"):
        (writers,) = sets
        parts = {n.split(".")[-2] for n in writers.exponents}
        assert parts == {"embed_tokens", "o_proj", "down_proj"}
        assert len(writers.exponents) == 5
    units = {n for s in symmetries.basis if s.kind == "unit" for n in s.exponents}
    assert units == (
        {n for n in symmetries.tensors if n.endswith(("q_proj.weight", "k_proj.weight"))} if name == "qwen3" else set()
    )
