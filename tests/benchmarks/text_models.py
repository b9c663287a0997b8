"""Small language models and a vision transformer of ``transformers``, and batches for them, for other benchmarks.

Language models read the characters of :class:`TextDataModule`, the vision transformer the images of
:class:`DigitsDataModule`, of whose training labels a part is redrawn. A run on one of them:

    model = make("llama", seed=0)
    for batch in batches(0, 32, 64, steps=100, name="llama"):
        loss(model, batch).backward()
    print(loss(model, validation(64, name="llama")))
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from lightning_normreg.demos import DigitsDataModule, TextDataModule

Batch = tuple[Tensor, Tensor]
NAMES = ("gpt2", "llama", "qwen3", "vit")
CHARACTERS, HEADS, LABEL_NOISE, STD = 96, 4, 0.2, 0.1


def make(name: str, seed: int, width: int = 64, layers: int = 2, *, eps: float = 1e-8, context: int = 64) -> nn.Module:
    """A model with random weights, in training mode and without dropout; embedding and head are two.

    Weights have standard deviation 0.1, about 1/√width, as 0.02 is at the widths that these models were made for.
    ``eps`` is that of all norms; at the start, where the stream has a mean square of about 0.01, it counts 1e-6 of it.
    GPT-2 has a table of ``context`` positions.
    """
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    sizes |= {"initializer_range": STD}
    words = {"vocab_size": CHARACTERS, "bos_token_id": None, "eos_token_id": None}
    gated = sizes | words | {"intermediate_size": 2 * width, "num_key_value_heads": HEADS, "rms_norm_eps": eps,
                             "head_dim": width // HEADS, "tie_word_embeddings": False}  # fmt: skip
    makers: dict[str, Any] = {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(
            n_embd=width, n_layer=layers, n_head=HEADS, n_positions=context, layer_norm_epsilon=eps,
            initializer_range=STD, tie_word_embeddings=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **words)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**gated)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**gated)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(
            **sizes, intermediate_size=4 * width, image_size=8, patch_size=2, num_channels=1, num_labels=10,
            layer_norm_eps=eps)),
    }  # fmt: skip
    if name not in makers:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}, got {name!r}.")
    torch.manual_seed(seed)
    model: nn.Module = makers[name]().train()
    return model


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy, of the next characters or of the class."""
    x, y = batch
    return nn.functional.cross_entropy(model(x).logits.flatten(0, -2), y.flatten())


def batches(seed: int, batch_size: int, context: int, steps: int, *, name: str = "llama") -> Iterator[Batch]:
    """Inputs and targets of so many steps, epoch after epoch in new orders; ``context`` means nothing to a ViT."""
    loader = _data(name, context, batch_size, seed).train_dataloader()
    return islice(chain.from_iterable(repeat(loader)), steps)


def validation(context: int, *, name: str = "llama", seed: int = 0, size: int = 256) -> Batch:
    """The first sequences of the validation text; of the digits those that ``batches`` leaves out at this seed."""
    x, y = next(iter(_data(name, context, 1, seed).val_dataloader()))
    return x[:size], y[:size]


def _data(name: str, context: int, batch_size: int, seed: int) -> DigitsDataModule | TextDataModule:
    data = (
        DigitsDataModule(batch_size, LABEL_NOISE, seed) if name == "vit" else TextDataModule(batch_size, context, seed)
    )
    data.setup("fit")
    return data
