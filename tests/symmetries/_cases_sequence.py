"""Attention and recurrence, labelled by hand as `_case` says."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetries._case import Case, case, cross_entropy, words


class Attention(nn.Module):
    """Fused qkv of 2 heads of width 4, with a normalization of queries and keys per head, or without."""

    def __init__(self, qk_norm: bool, bias: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=bias), nn.Linear(8, 8, bias=bias)
        self.q_norm = nn.RMSNorm(4) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(4) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with its norms before ("pre"), after the sum ("post"), or around the branch ("sandwich")."""

    def __init__(self, place: str, qk_norm: bool = False, zero: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.attention = Attention(qk_norm, bias)
        self.up, self.down = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8, bias=bias)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.after1 = nn.LayerNorm(8) if place == "sandwich" else nn.Identity()
        self.after2 = nn.LayerNorm(8) if place == "sandwich" else nn.Identity()
        self.place = place
        if zero:
            nn.init.zeros_(self.attention.out.weight)
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then a gated feed-forward layer."""
        if self.place == "post":
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.after1(self.attention(self.norm1(x)))
        return x + self.after2(self.down(F.gelu(self.up(self.norm2(x)))))


class LanguageModel(nn.Module):
    """Word and place embeddings, blocks, a final norm if they need one, and a head, tied or not."""

    def __init__(self, place: str, tied: bool = False, **kwargs: bool) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(11, 8), nn.Parameter(0.1 * torch.randn(7, 8))
        self.blocks = nn.Sequential(Block(place, **kwargs), Block(place, **kwargs))
        self.norm = nn.LayerNorm(8) if place != "post" else nn.Identity()
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next word."""
        return self.head(self.norm(self.blocks(self.embedding(x) + self.place)))


@case
def pre_norm_transformer() -> Case:
    """Every branch adds to a stream of fixed size; q scales against k, v against out, and GELU is not homogeneous."""
    return Case(LanguageModel("pre"), words(), cross_entropy, {})


@case
def post_norm_transformer() -> Case:
    """Every branch is added to its input before the norm.

    The key's bias only shifts all scores of a query: rows 8 to 16 of qkv's bias are inert, the others are not, so the
    vector as a whole is none.
    """
    return Case(LanguageModel("post", bias=True), words(), cross_entropy, {})


@case
def pre_norm_transformer_with_zero_branches() -> Case:
    """At the start the branches put out nothing, and the embedding looks invariant. It is not, once they wake up."""
    return Case(LanguageModel("pre", zero=True), words(), cross_entropy, {})


@case
def tied_language_model() -> Case:
    """The embedding is also the head, so scaling it scales the logits."""
    return Case(LanguageModel("pre", tied=True), words(), cross_entropy, {})


@case
def qk_norm_attention() -> Case:
    """Each head of q and of k is normalized by itself: blocks of 4 in the rows 0 to 16 of qkv. v is not."""
    labels = {f"blocks.{i}.attention.qkv.weight": "block:4[0:16]" for i in range(2)}
    return Case(LanguageModel("pre", qk_norm=True), words(), cross_entropy, labels)


@case
def qk_norm_attention_with_bias() -> Case:
    """The bias of q and k is inside of the norm, so it goes along."""
    labels = {f"blocks.{i}.attention.qkv.weight": "block:4[0:16]+bias" for i in range(2)}
    return Case(LanguageModel("pre", qk_norm=True, bias=True), words(), cross_entropy, labels)


@case
def sandwich_norm() -> Case:
    """The branch is normalized before it is added: out and down are layers.

    v passes through linearly: rows 16 to 24, one block, because the heads meet in out before the norm.
    """
    labels = {}
    for i in range(2):
        labels |= {f"blocks.{i}.attention.out.weight": "layer", f"blocks.{i}.down.weight": "layer"}
        labels |= {f"blocks.{i}.attention.qkv.weight": "block:8[16:24]"}
    return Case(LanguageModel("sandwich"), words(), cross_entropy, labels)


class NormalizedLSTM(nn.Module):
    """LSTM cell with one LayerNorm for the input's and one for the state's contribution to the gates."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.state = nn.Linear(6, 16, bias=False), nn.Linear(4, 16, bias=False)
        self.norm_input, self.norm_state, self.head = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits after the last step."""
        h = c = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            i, f, g, o = (self.norm_input(self.input(step)) + self.norm_state(self.state(h))).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


@case
def lstm_with_layernorm() -> Case:
    """Both matrices are layers in front of their own norm."""
    batch = (torch.randn(4, 5, 6), torch.arange(4) % 3)
    return Case(NormalizedLSTM(), batch, cross_entropy, {"input.weight": "layer", "state.weight": "layer"})


@case
def lstm_before_layernorm() -> Case:
    """Torch's LSTM squashes by tanh, which is not homogeneous, whatever normalizes its output."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.norm, self.head = nn.LSTM(6, 4, batch_first=True), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.lstm(x)[0][:, -1]))

    return Case(Recurrent(), (torch.randn(4, 5, 6), torch.arange(4) % 3), cross_entropy, {})
