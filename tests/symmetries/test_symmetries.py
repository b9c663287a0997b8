"""All scaling symmetries of a loss, against bases that were reasoned by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_normreg import Symmetries, find_symmetries
from tests.symmetries import _symmetry_cases_attention as _symmetry_cases_attention
from tests.symmetries import _symmetry_cases_fused as _symmetry_cases_fused
from tests.symmetries import _symmetry_cases_pictures as _symmetry_cases_pictures
from tests.symmetries import _symmetry_cases_sequences as _symmetry_cases_sequences
from tests.symmetries._symmetry_case import CASES, Labelled, log_loss, vectors
from tests.symmetries._symmetry_cases import Residual, batch_norm, fused_attention, pre_norm, relu

Basis = set[tuple[str, frozenset[tuple[str, int]]]]


# By type: largest singular value of a symmetry, smallest of what is none, largest change of the loss. Roundoff u of the
# loss and its gradients comes out some 10 to 100 times larger; the gap is that of the facts, four orders at least.
BOUNDS = {"float64": (1e-13, 1e-4, 1e-12), "float32": (1e-6, 1e-4, 1e-5)}


def found(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Tensor],
    seed: int = 0,
    dtype: Literal["float64", "float32"] = "float64",
) -> Symmetries:
    """What is found, checked by what says by itself whether to believe it."""
    model.train()
    symmetries = find_symmetries(model, batch, forward=loss, seed=seed, layers="apart", dtype=dtype, progress=False)
    null, other, change = BOUNDS[dtype]
    assert symmetries.largest < null
    assert symmetries.smallest > other
    assert symmetries.certificate < change
    return symmetries


def basis_of(symmetries: Symmetries) -> Basis:
    """The basis as a set."""
    return {(s.kind, frozenset(s.exponents.items())) for s in symmetries.basis}


@pytest.mark.parametrize(
    "seed, dtype",
    [
        (0, "float64"),
        (0, "float32"),
        *(pytest.param(seed, dtype, marks=pytest.mark.slow) for seed in (1, 2) for dtype in ("float64", "float32")),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_bases_reasoned_by_hand(name: str, seed: int, dtype: Literal["float64", "float32"]) -> None:
    """Kinds, exponents and what is inert; for points of any seed, in both types."""
    torch.manual_seed(seed)
    labelled = CASES[name]()
    symmetries = found(labelled.model, labelled.batch, labelled.loss, seed, dtype)
    assert basis_of(symmetries) == labelled.basis
    assert symmetries.inert == labelled.inert


def test_enough_architectures_are_labelled() -> None:
    """None is lost by an import that is left out."""
    assert len(CASES) >= 36


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
    # As without the tie, but the stream's writers and the last gain have only each other.
    "llama_tied": 5 * 2 + 1,
    # Per layer of two: query against key, value against output (each with the biases that it has), and for each of two
    # norms a gain and shift that come out of it and have to be in the branch that is added before the next. Once: word,
    # place and type embeddings, of which words are the head, against the gain and shift in front of that; and the last
    # layer's gain and shift with the transform of the head.
    "bert": 4 * 2 + 2,
    # Per layer of the encoder: q/k, v/o, a gain with q, k, v, wi/wo (ReLU), another gain with wi. Per layer of the
    # decoder the same, and for the cross attention q/k, v/o, a gain with q. Once: the encoder's last gain with keys and
    # values of all cross attentions; and the writers of both streams, which the embedding ties together and to the
    # head, against the decoder's last gain. Tables of positions are added to scores and stay.
    "t5": 5 * 2 + 8 * 2 + 2,
    # v, o, up and down alone, in front of the norm at the end of their branch; q/k; the gain with q and k (v does not
    # mind), another with the gate. Once: the embedding, which is the head, and the gains after branches against the
    # last. All gains are 1 + γ.
    "gemma2": 7 * 2 + 1,
    # q and k are alone, too, with gains of their own that are a pair, so the gain in front of q, k and v is alone.
    "gemma3": 9 * 2 + 1,
    # q, k, v, o, up, down alone; the gains of q and k. Nothing is normalized before it is read: once, the embedding and
    # the gains after branches against all gates; and the last gain with the head.
    "olmo2": 7 * 2 + 2,
}
"""What is fused counts apart: so GPT-2's thirds of qkv have the nine symmetries of q, k and v apart."""

UNITS = {
    "qwen3": "q_proj k_proj",
    "gemma2": "v_proj o_proj up_proj down_proj",
    "gemma3": "q_proj k_proj v_proj o_proj up_proj down_proj input_layernorm",
    "olmo2": "q_proj k_proj v_proj o_proj up_proj down_proj",
}
"""Which layers are alone, by the same reasons."""


@pytest.mark.parametrize("name", DIMENSIONS)
def test_models_of_transformers(name: str) -> None:
    """As many as by hand, none false (the certificate) and none missed (the gap)."""
    cases = pytest.importorskip("tests.symmetries._transformers_cases")
    torch.manual_seed(0)
    case = getattr(cases, name)()
    symmetries = found(case.model, case.batch, cases.own_loss)
    assert len(symmetries.basis) == DIMENSIONS[name]
    together = find_symmetries(case.model, case.batch, forward=cases.own_loss, layers="together")
    assert together.passes < symmetries.passes
    assert together.tensors == symmetries.tensors
    both = torch.cat([symmetries.matrix(), together.matrix()], dim=1)
    assert torch.linalg.matrix_rank(both) == len(together.basis) == DIMENSIONS[name]
    if name != "bert":  # where a chain of pairs, from norm to norm, may be told from either end
        assert basis_of(together) == basis_of(symmetries)
    assert {s.kind for s in symmetries.basis} <= {"unit", "set", "pair"}
    sets = [s for s in symmetries.basis if s.kind == "set"]
    if name in ("llama", "qwen3", "llama_tied"):
        # Tied, the last gain is against them.
        (writers,) = sets if name != "llama_tied" else [s for s in symmetries.basis if len(s.exponents) == 6]
        parts = {n.split(".")[-2] for n, power in writers.exponents.items() if power > 0}
        assert parts == {"embed_tokens", "o_proj", "down_proj"}
        assert len(writers.exponents) == 5 + (name == "llama_tied")
    units = {n for s in symmetries.basis if s.kind == "unit" for n in s.exponents}
    assert units == {n for n in symmetries.tensors if n.split(".")[-2] in UNITS.get(name, "").split()}


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
def test_the_share_of_eps_is_that_of_the_loss(eps: float) -> None:
    """At the user's weights and eps: the derivative of the loss along the symmetry, by central differences.

    With steps h = 1e-5 these are exact to h² and to u/h, 1e-10. Where the set is made smaller by the factor that is
    said, the share is 10 %, up to the share's own size: eps/(variance + eps) instead of eps/variance.
    """
    torch.manual_seed(0)
    model, batch = Residual(lambda: nn.LayerNorm(6, eps=eps)).double().train(), vectors().double()
    symmetries = find_symmetries(model, batch, forward=log_loss, progress=False)
    (writers,) = (s for s in symmetries.basis if s.kind == "set")
    weights = [model.get_parameter(name) for name in writers.exponents]

    def loss_at(factor: float) -> float:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(factor)
            loss = log_loss(model, batch).item()
            for weight in weights:
                weight.div_(factor)
        return loss

    slope = (loss_at(math.exp(1e-5)) - loss_at(math.exp(-1e-5))) / 2e-5
    gradients = torch.autograd.grad(log_loss(model, batch), weights)
    size = math.sqrt(sum((w * g).square().sum().item() for w, g in zip(weights, gradients, strict=True)))
    assert writers.eps_share == pytest.approx(abs(slope) / size, rel=1e-4, abs=1e-9)
    assert all((s.eps_share or 0.0) < 1e-14 for s in symmetries.basis if s.kind == "pair")
    assert {s.least_factor for s in symmetries.basis if s.kind == "pair"} == {None}
    if eps:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(writers.least_factor)
        again = find_symmetries(model, batch, forward=log_loss, progress=False)
        (share,) = (s.eps_share for s in again.basis if s.kind == "set")
        assert share == pytest.approx(0.1, rel=0.25)
