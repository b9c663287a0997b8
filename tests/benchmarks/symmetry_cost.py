"""What :func:`find_symmetries` costs: passes, seconds in training steps, and memory beside the model.

``python -m tests.benchmarks.symmetry_cost [MODEL …]``; needs ``transformers``. A training step is AdamW's in float32,
on 8 sequences of 256 tokens; the samples that are asked are 2 of 16.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normreg import find_scale_invariance, find_symmetries
from lightning_normreg._symmetries import passes_needed

VOCABULARY = 50257


def gpt2(width: int, depth: int, vocabulary: int = VOCABULARY) -> nn.Module:
    """As large as asked."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=width, n_layer=depth, n_head=width // 32, vocab_size=vocabulary, resid_pdrop=0, embd_pdrop=0,
                   attn_pdrop=0)
    )  # fmt: skip


class Hybrid(nn.Module):
    """Twelve layers of which no two are of one kind: widths differ, every third is a convolution over the sequence."""

    def __init__(self, width: int = 128, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embed, self.last, self.head = (
            nn.Embedding(vocabulary, width), nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False),
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(12))
        self.layers = nn.ModuleList()
        for number in range(12):
            inner = 64 + 16 * number
            if number % 3:
                parts: dict[str, nn.Module] = {"into": nn.Linear(width, inner), "out": nn.Linear(inner, width)}
            else:
                parts = {"into": nn.Conv1d(width, inner, 3, padding=1), "out": nn.Conv1d(inner, width, 1)}
            self.layers.append(nn.ModuleDict(parts))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """Loss."""
        x = self.embed(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = norm(x)
            if isinstance(layer["into"], nn.Conv1d):
                x = x + layer["out"](torch.relu(layer["into"](y.transpose(1, 2)))).transpose(1, 2)
            else:
                x = x + layer["out"](torch.relu(layer["into"](y)))
        logits = self.head(self.last(x))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


MODELS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "GPT-2, 124 M": (lambda: gpt2(768, 12), VOCABULARY, "together"),
    "GPT-2, 20 M": (lambda: gpt2(320, 6), VOCABULARY, "together"),
    "48 layers, 15 M": (lambda: gpt2(160, 48, 1000), 1000, "together"),
    "12-layer hybrid": (Hybrid, 1000, "apart"),
}


def loss_of(module: nn.Module, ids: Tensor) -> Tensor:
    """Of the model itself."""
    loss: Tensor = module(input_ids=ids, labels=ids)["loss"]
    return loss


def peak() -> float:
    """Largest memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measured(name: str) -> str:
    """One line of the table."""
    make, vocabulary, layers = MODELS[name]
    torch.manual_seed(0)
    module = make().train()
    size = sum(p.numel() for p in module.parameters())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        loss_of(module, torch.randint(vocabulary, (8, 256))).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    before, started = peak(), time.perf_counter()
    ids = torch.randint(vocabulary, (2, 16))
    how: dict[str, Any] = {"forward": loss_of, "progress": False}
    units = find_scale_invariance(module, ids, **how)
    unit_seconds = time.perf_counter() - started
    started = time.perf_counter()
    found = find_symmetries(module, ids, layers=layers, **how)
    own = time.perf_counter() - started
    step = min(seconds)
    return (
        f"| {name} | {size / 1e6:.1f} M | {len(units)} | {len(found.basis)} | {found.passes} "
        f"({passes_needed(module, layers)} said before) | {own / step:.1f} | {unit_seconds / step:.1f} | "  # type: ignore[arg-type]
        f"{(peak() - before) / (4 * size / 2**30):.1f} | {found.largest:.0e} / {found.smallest:.0e} |"
    )


HEAD = (
    "| model | weights | tensors | symmetries | passes | symmetries, steps | units, steps | memory, models | gap |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)

if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in MODELS:
        print(measured(sys.argv[1]))
    else:
        print(HEAD, flush=True)
        for each in sys.argv[1:] or MODELS:  # each in a process of its own, whose peak of memory is its own
            subprocess.run([sys.executable, "-m", "tests.benchmarks.symmetry_cost", each], check=True)
