"""Networks of words whose scaling symmetries were reasoned by hand, as in `_symmetry_cases`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetries._symmetry_case import Labelled, case, within
from tests.symmetries._symmetry_cases_attention import (
    WIDTH,
    WORDS,
    _Attention,
    _Block,
    _Gated,
    _Plain,
    biased,
    linear,
    model_of,
    turned,
    words,
)


class _EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.norm1, self.encoder, self.encoded = nn.RMSNorm(WIDTH), _Attention(), nn.RMSNorm(WIDTH)
        self.norm2, self.decoder = nn.RMSNorm(WIDTH), _Attention()
        self.norm3, self.cross = nn.RMSNorm(WIDTH), _Attention()
        self.norm4, self.mlp = nn.RMSNorm(WIDTH), _Plain(F.relu, bias=False)
        self.last, self.head = nn.RMSNorm(WIDTH), linear(after=WORDS)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        memory, x = self.source(batch[0]), self.target(batch[1])
        memory = self.encoded(memory + self.encoder(self.norm1(memory)))
        x = x + self.decoder(self.norm2(x))
        x = x + self.cross(self.norm3(x), memory)
        return self.head(self.last(x + self.mlp(self.norm4(x))))


@case
def encoder_decoder() -> Labelled:
    """Two streams, each normalized by all of its readers: their writers are two sets, as the embeddings are apart.

    Queries of the cross attention read the decoder's norm, keys and values that at the end of the encoder. In each of
    the three attentions q goes with k and v with o; ReLU hands up's factor to down. What the encoder's gain does to
    scores can be undone in three places that go with each other: keys, queries, and the gain in front of these, which
    stands for the three as it is used next.
    """
    return Labelled(
        _EncoderDecoder(),
        (words(), words(length=4)),
        *(("pair", f"{name}.q.weight {name}.k.weight^-1") for name in ("encoder", "decoder", "cross")),
        *(("pair", f"{name}.v.weight {name}.o.weight^-1") for name in ("encoder", "decoder", "cross")),
        ("pair", "mlp.up.weight mlp.down.weight^-1"),
        ("set", "source.weight encoder.o.weight"),
        ("set", "target.weight decoder.o.weight cross.o.weight mlp.down.weight"),
        ("pair", "norm1.weight encoder.q.weight^-1 encoder.k.weight^-1 encoder.v.weight^-1"),
        ("pair", "encoded.weight norm3.weight^-1 cross.v.weight^-1"),
        ("pair", "norm2.weight decoder.q.weight^-1 decoder.k.weight^-1 decoder.v.weight^-1"),
        ("pair", "norm3.weight cross.q.weight^-1"),
        ("pair", "norm4.weight mlp.up.weight^-1"),
        ("pair", "last.weight head.weight^-1"),
    )


class _NormAfter(nn.Module):
    """Norms at the end of each branch, and on q and k."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1 = _Attention(norm=True), nn.RMSNorm(WIDTH)
        self.mlp, self.norm2 = _Gated(), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attention(x))
        return x + self.norm2(self.mlp(x))


@case
def norm_after_branch() -> Labelled:
    """As in OLMo 2: all but the gate enter a norm linearly.

    q and k have norms of their own, whose gains are a pair; v and o, up and down have that at the end of the branch.
    Embedding and these gains write to the stream, which nothing normalizes before it is read: the units do not mind,
    but the gate, which goes through SiLU, has to undo the factor.
    """
    return Labelled(
        model_of(_NormAfter(), nn.RMSNorm(WIDTH)),
        words(),
        *(("unit", f"1.attention.{name}.weight") for name in "qkvo"),
        *(("unit", f"1.mlp.{name}.weight") for name in ("up", "down")),
        ("pair", within("1.attention.", "q_norm.weight k_norm.weight^-1")),
        ("pair", "0.weight 1.norm1.weight 1.norm2.weight 1.mlp.gate.weight^-1"),
        ("pair", "2.weight 3.weight^-1"),
    )


class _PostNorm(nn.Module):
    """The original transformer's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1 = _Attention(bias="qkvo"), nn.LayerNorm(WIDTH)
        self.mlp, self.norm2 = _Plain(F.gelu, bias=True), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class _Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.place, self.norm = nn.Embedding(WORDS, WIDTH), nn.Embedding(5, WIDTH), nn.LayerNorm(WIDTH)
        self.layers, self.head = nn.ModuleList(_PostNorm() for _ in range(2)), linear(after=WORDS, bias=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.word(ids) + self.place(torch.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@case
def post_norm() -> Labelled:
    """As in BERT: between two norms the stream is one gain and shift with what one branch adds.

    Embeddings of words and places are added in front of a norm, a set. What comes out of a norm, times a, stays behind
    the next norm if the branch adds a times as much. Attention does if q and k undo the factor in the scores (not in
    their biases, which come after) and v takes it on with its weight as it is, but with a times its bias, and o with a
    times its bias, too. With GELU up undoes it, and down makes it anew. The last norm meets the head.
    """
    inputs = ["norm", "layers.0.norm2"]
    labels = [label for i in (0, 1) for label in biased(f"layers.{i}.")]
    for i, norm in enumerate(inputs):
        branch = within(f"layers.{i}.attention.", "q.weight^-1 k.weight^-1 v.bias o.bias")
        labels.append(("pair", f"{norm}.weight {norm}.bias {branch}"))
        branch = within(f"layers.{i}.", "norm1.weight norm1.bias mlp.up.weight^-1 mlp.down.weight mlp.down.bias")
        labels.append(("pair", branch))
    return Labelled(
        _Bert(),
        words(),
        ("set", "word.weight place.weight"),
        *labels,
        ("pair", "layers.1.norm2.weight layers.1.norm2.bias head.weight^-1"),
        inert="layers.0.attention.k.bias layers.1.attention.k.bias",
    )


class _Latent(nn.Module):
    """Queries, and keys with values, through a narrow layer and a norm each; keys have a part from the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.q_down, self.q_norm, self.q_up = linear(after=4), nn.RMSNorm(4), linear(4, WIDTH)
        self.kv_down, self.kv_norm = linear(after=5), nn.RMSNorm(5)
        self.k_turned, self.k_up, self.v_up, self.o = linear(after=4), linear(5, 4), linear(5, WIDTH), linear()

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_up(self.q_norm(self.q_down(x)))
        narrow = self.kv_down(x)
        late = turned(self.k_turned(x))
        narrow = self.kv_norm(narrow)
        k, v = torch.cat([self.k_up(narrow), late], dim=-1), self.v_up(narrow)
        q = torch.cat([q[..., :4], turned(q[..., 4:])], dim=-1)
        return self.o((q @ k.transpose(-1, -2)).softmax(dim=-1) @ v)


@case
def latent_attention() -> Labelled:
    """As in DeepSeek: what is narrow is normalized, so the layers down are units.

    Of the norm in front they take the factor away, too; only the part of the keys without a norm has it, and so have
    the scores with that part of the queries: either undoes it, and that part of the queries is used first. Queries have
    one layer up for both parts, whose rows go with one part of the keys each. The norm of what is narrow is read by
    keys and values.
    """
    return Labelled(
        model_of(_Block(nn.RMSNorm, _Latent(), _Gated()), nn.RMSNorm(WIDTH)),
        words(),
        ("unit", "1.attention.q_down.weight"),
        ("unit", "1.attention.kv_down.weight"),
        ("pair", within("1.", "norm1.weight attention.q_up.weight[4:8]^-1")),
        ("pair", within("1.attention.", "q_norm.weight q_up.weight[0:4]^-1 q_up.weight[4:8]^-1")),
        ("pair", within("1.attention.", "q_up.weight[0:4] k_up.weight^-1")),
        ("pair", within("1.attention.", "q_up.weight[4:8] k_turned.weight^-1")),
        ("pair", within("1.attention.", "kv_norm.weight k_up.weight^-1 v_up.weight^-1")),
        ("pair", within("1.attention.", "v_up.weight o.weight^-1")),
        ("pair", within("1.mlp.", "up.weight down.weight^-1")),
        ("pair", within("1.", "norm2.weight mlp.gate.weight^-1 mlp.up.weight^-1")),
        ("set", "0.weight 1.attention.o.weight 1.mlp.down.weight"),
        ("pair", "2.weight 3.weight^-1"),
    )


class _Recurrent(nn.Module):
    """A gated linear recurrence, h = sigmoid(a(x))·h + b(x)·u(x), read by c(x), with a skip as in Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH)
        self.forget, self.gate = linear(bias=True), linear()
        self.enter, self.b, self.c = linear(), linear(), linear()
        self.skip, self.out = nn.Parameter(torch.rand(WIDTH) + 0.5), linear()
        self.last, self.head = nn.RMSNorm(WIDTH), linear(after=WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norm(x)
        keep, gate, u = torch.sigmoid(self.forget(y)), F.silu(self.gate(y)), self.enter(y)
        enters, reads = self.b(y) * u, self.c(y)
        state, states = torch.zeros_like(u[:, 0]), []
        for t in range(ids.shape[1]):
            state = keep[:, t] * state + enters[:, t]
            states.append(state)
        y = reads * torch.stack(states, dim=1) + self.skip * u
        return self.head(self.last(x + self.out(gate * y)))


@case
def linear_recurrence() -> Labelled:
    """The state is linear in what enters, b(x)·u(x), and so is what is read of it, c(x)·h + skip·u.

    So b goes with c. A factor of c and of the skip is undone in the layer out, and so is one of u. Forgetting and gate
    go through functions that hand no factor on: they undo that of the norm for themselves, as u, b and c do. Embedding
    and the layer out write to the stream.
    """
    readers = "forget.weight^-1 gate.weight^-1 enter.weight^-1 b.weight^-1 c.weight^-1"
    return Labelled(
        _Recurrent(),
        words(),
        ("pair", "b.weight c.weight^-1"),
        ("pair", "enter.weight out.weight^-1"),
        ("pair", "c.weight skip out.weight^-1"),
        ("pair", f"norm.weight {readers}"),
        ("set", "embed.weight out.weight"),
        ("pair", "last.weight head.weight^-1"),
    )


class _NormLSTM(nn.Module):
    """LSTM with LayerNorm on both products that make the gates, and on the cell; the state at the start is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.into, self.again = nn.Embedding(WORDS, 6), linear(6, 20), linear(5, 20)
        self.norm_x, self.norm_h, self.norm_c = nn.LayerNorm(20), nn.LayerNorm(20), nn.LayerNorm(5)
        self.hidden, self.cell = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
        self.head = linear(5, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        h, c = (start.expand(len(ids), -1) for start in (self.hidden, self.cell))
        states = []
        for x in self.embed(ids).unbind(1):
            i, f, g, o = (self.norm_x(self.into(x)) + self.norm_h(self.again(h))).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.norm_c(c).tanh()
            states.append(h)
        return self.head(torch.stack(states, dim=1))


@case
def norm_lstm() -> Labelled:
    """Both matrices are in front of a norm, each with what it reads: of the embedding, and of the first hidden state.

    Later hidden states are behind tanh, so they have no factor, which nobody minds. The first cell is added to what
    enters, which is behind tanh, too: it has none. Gains and shifts bend the gates.
    """
    return Labelled(
        _NormLSTM(), words(), *(("unit", n) for n in ("embed.weight", "into.weight", "again.weight", "hidden"))
    )
