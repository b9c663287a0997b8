"""What the probe and the observer cost, in training steps and in memory: ``python tests/benchmarks/probe_cost.py``.

A training step here is forward, backward and an SGD step on 32 samples; the probe sees 4 of them. Memory is the growth
of the peak resident size while it runs, in units of the parameters' float32 bytes, activations included. Each model has
a process of its own, in which the allocator gives memory back: what glibc keeps for later would be counted twice.
The observer's share is that of a step that it looks at, the fastest of several.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normreg._symmetries import find_scale_invariance
from lightning_normreg._symmetries._thresholds import WIDE_OBSERVER
from lightning_normreg._weights._roles import named_roles
from lightning_normreg.steps._observer import GradientObserver

BATCH, PROBED = 32, 4


class BasicBlock(nn.Module):
    """Two convolutions with BatchNorm around a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.short = nn.Identity()
        if stride > 1 or inner != outer:
            self.short = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Residual block."""
        return (self.short(x) + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    """11.2 million parameters, on images of 32 × 32."""
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [BasicBlock(*w) for w in [*widths, (512, 512, 1)]]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    net = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return net, torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))


class TransformerBlock(nn.Module):
    """Pre-norm block with QK-norm and fused qkv."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.up, self.down, self.heads = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the feed-forward layer."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    """20 million parameters, on 64 words out of 4000."""
    width, depth, vocabulary = 384, 10, 4000
    blocks = [TransformerBlock(width, 6) for _ in range(depth)]
    net = nn.Sequential(nn.Embedding(vocabulary, width), *blocks, nn.LayerNorm(width), nn.Linear(width, vocabulary))
    return net, torch.randint(vocabulary, (BATCH, 64)), torch.randint(vocabulary, (BATCH, 64))


def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    logits = module(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def peak_memory() -> int:
    """Most bytes that were resident at once, since the last reset; Linux only."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) * 1024


def reset_peak_memory() -> int:
    """Forget the peak so far, where Linux allows that, and return what is resident now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return peak_memory()


def step_time(module: nn.Module, batch: tuple[Tensor, Tensor], steps: int = 4) -> float:
    """Second fastest of a few training steps, in seconds."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_of(module, batch).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


def observed_time(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Seconds that the observer spends on the gradients of one step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    optimizer.zero_grad()
    loss_of(module, (x, y)).backward()
    observer = GradientObserver(named_roles(module), WIDE_OBSERVER)
    times = []
    for _ in GradientObserver.STEPS[:3]:
        start = time.perf_counter()
        observer.gradients_ready(0, optimizer, 1.0)
        times.append(time.perf_counter() - start)
        observer.after_step(0, optimizer, None)
    return min(times)


def measure(name: str, dtype: str) -> None:
    """Print the cost for one model in one type."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, x, y = {"resnet18": resnet18, "transformer": transformer}[name]()
    step_time(module, (x[:PROBED], y[:PROBED]), steps=2)
    module.zero_grad()
    resident = reset_peak_memory()
    start = time.perf_counter()
    how: dict[str, Any] = {"in_place": True} if dtype == "in place" else {"dtype": dtype}
    verdicts = find_scale_invariance(module, (x[:PROBED], y[:PROBED]), forward=loss_of, **how)
    took, memory = time.perf_counter() - start, peak_memory() - resident
    step = step_time(module, (x, y))
    observed = observed_time(module, x, y)
    count = sum(p.numel() for p in module.parameters())
    invariant = sum(v.is_invariant for v in verdicts.values())
    print(
        f"{name:12s} {dtype:8s}: {count / 1e6:5.1f} M parameters, step {step:.2f} s, probe {took:5.1f} s = "
        f"{took / step:4.1f} steps, memory {memory / count / 4:.1f} × the parameters, observer {observed / step:.1%}, "
        f"{invariant} of {len(verdicts)} invariant",
        flush=True,
    )


if __name__ == "__main__":
    warnings.simplefilter("error")
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    for model in ("resnet18", "transformer"):
        for kind in ("float64", "float32", "in place"):
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(model, kind))
            process.start()
            process.join()
