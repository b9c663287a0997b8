"""Models of ``transformers`` with tiny random configurations. Labels as in ``_cases``, but names are globs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

hf = pytest.importorskip(
    "transformers", reason="transformers is not installed, and its models are only tested where it is"
)


class Pretrained(NamedTuple):
    """A model, its batch, and labels by glob; whatever no glob matches is "none"."""

    model: nn.Module
    batch: dict[str, Tensor]
    labels: dict[str, str]


WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
DECODER = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


def own_loss(module: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The loss that the model itself returns."""
    return module(**batch).loss


def words(n: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Words 1 to 49, with the same words as labels."""
    ids = torch.randint(1, 50, (n, length))
    return {"input_ids": ids, "labels": ids.clone()}


def pictures(size: int = 16) -> dict[str, Tensor]:
    """Four images of three classes."""
    return {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.arange(4) % 3}


def bert() -> Pretrained:
    """Post-LN: branch and stream are added before the norm. A key bias shifts all scores of a query alike: inert."""
    batch = words()
    batch["input_ids"][:, -2:] = 0  # pad words, not masked, so that the loss depends on them
    config = hf.BertConfig(**WIDTHS, type_vocab_size=2, pad_token_id=0)
    return Pretrained(hf.BertForMaskedLM(config), batch, {"*.key.bias": "inert"})


def gpt2() -> Pretrained:
    """Pre-LN, fused qkv of shape (in, out) without a norm on q and k; embedding and head are tied."""
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=50, bos_token_id=0, eos_token_id=0
    )
    return Pretrained(hf.GPT2LMHeadModel(config), words(), {})


def vit() -> Pretrained:
    """Pre-LN; patches are added to places in the stream. Key biases are inert."""
    narrow = {k: v for k, v in WIDTHS.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = hf.ViTConfig(**narrow, image_size=16, patch_size=8, num_labels=3)
    return Pretrained(hf.ViTForImageClassification(config), pictures(), {"*.k_proj.bias": "inert"})


def llama() -> Pretrained:
    """Pre-norm, gated feed-forward layer: only pairs (q and k, v and o, up and down) can be rescaled."""
    return Pretrained(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), words(), {})


def llama_tied() -> Pretrained:
    """The same with the embedding as head."""
    return Pretrained(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True)), words(), {})


def t5() -> Pretrained:
    """Pre-norm encoder and decoder, relative positions added to the scores."""
    config = hf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0, pad_token_id=0
    )
    return Pretrained(hf.T5ForConditionalGeneration(config), words(), {})


# In a branch that ends in a norm, everything that enters it linearly is a layer: o after v, and down after up, which is
# multiplied by the gate. The gate itself goes through an activation.
NORMALIZED_BRANCH = {f"*.{name}_proj.weight": "layer" for name in ("v", "o", "up", "down")}


def gemma2() -> Pretrained:
    """Norms before and after each branch; scores are capped by tanh, and q and k have no norm."""
    config = hf.Gemma2Config(**DECODER, query_pre_attn_scalar=8, sliding_window=8)
    return Pretrained(hf.Gemma2ForCausalLM(config), words(), NORMALIZED_BRANCH)


def gemma3() -> Pretrained:
    """As Gemma 2, and each head (8 rows) of q and k is normalized."""
    config = hf.Gemma3TextConfig(**DECODER, query_pre_attn_scalar=8, sliding_window=8)
    heads = {"*.q_proj.weight": "block:8", "*.k_proj.weight": "block:8"}
    return Pretrained(hf.Gemma3ForCausalLM(config), words(), {**NORMALIZED_BRANCH, **heads})


def olmo2() -> Pretrained:
    """Branches end in a norm; q and k are normalized over all heads at once, so they are layers."""
    config = hf.Olmo2Config(**{k: v for k, v in DECODER.items() if k != "head_dim"})
    whole = {"*.q_proj.weight": "layer", "*.k_proj.weight": "layer"}
    return Pretrained(hf.Olmo2ForCausalLM(config), words(), {**NORMALIZED_BRANCH, **whole})


def qwen3() -> Pretrained:
    """Pre-norm, and each head (8 rows) of q and k is normalized."""
    labels = {"*.q_proj.weight": "block:8", "*.k_proj.weight": "block:8"}
    return Pretrained(hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER)), words(), labels)


def qwen3_experts() -> Pretrained:
    """As Qwen 3; the experts add to the stream, weighted by a softmax."""
    config = hf.Qwen3MoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    labels = {"*.q_proj.weight": "block:8", "*.k_proj.weight": "block:8"}
    return Pretrained(hf.Qwen3MoeForCausalLM(config), words(), labels)


def convnext() -> Pretrained:
    """Patches and depthwise convolutions go straight into a LayerNorm over channels, with their bias."""
    config = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3)
    linear = ("*.dwconv.weight", "*patch_embeddings.weight")
    return Pretrained(hf.ConvNextForImageClassification(config), pictures(), dict.fromkeys(linear, "layer+bias"))


def resnet() -> Pretrained:
    """Every convolution is in front of a BatchNorm."""
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=3)
    return Pretrained(hf.ResNetForImageClassification(config), pictures(), {"*.convolution.weight": "neuron"})


PRETRAINED: dict[str, Callable[[], Pretrained]] = {
    build.__name__: build
    for build in (bert, gpt2, vit, llama, t5, gemma2, gemma3, olmo2, qwen3, qwen3_experts, convnext, resnet)
}
