"""Huge embeddings: only the rows that the samples reach are looked at, and the others inherit the answer.

A row without a gradient says nothing, so a private copy may as well have a small table of the rows that are read. It is
the same model with a smaller vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normreg._symmetries._call import Loss, PrivateCall
from lightning_normreg._symmetries._losses import ProbeError

LARGE = 1_000_000
"""Entries of a table from which on a smaller one is worth its while."""


def tables(module: nn.Module) -> dict[str, nn.Module]:
    """Name → each large embedding whose table nobody else uses."""
    users = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    return {
        name: m
        for name, m in module.named_modules()
        if type(m) in (nn.Embedding, nn.EmbeddingBag)
        and isinstance(m.weight, nn.Parameter)
        and m.weight.numel() >= LARGE
        and users[id(m.weight)] == 1
    }


def reached_rows(module: nn.Module, loss: Loss | None, batch: Any) -> dict[str, Tensor]:
    """Name of each large embedding → rows that the samples read, in one forward pass; none if that fails."""
    found: dict[str, list[Tensor]] = {}
    if not tables(module):
        return {}
    wide = next(module.parameters()).dtype == torch.float64
    call = PrivateCall(module, loss, batch, torch.float64 if wide else torch.float32)
    for name, m in tables(call.module).items():
        # The first two as well, so that there is more than one: a single row cannot tell a row from all of them.
        always = [0, 1, getattr(m, "padding_idx", None) or 0]
        found[name] = [torch.tensor(always, device=m.weight.device)]  # type: ignore[arg-type]
        m.register_forward_pre_hook(lambda _m, args, name=name: found[name].append(args[0].flatten()))
    try:
        call.run(dict(call.module.named_parameters()), lambda loss: None, seed=0)
    except ProbeError:
        return {}
    return {name: torch.unique(torch.cat(rows)) for name, rows in found.items() if len(rows) > 1}


def shrink_tables(copy: nn.Module, reached: Mapping[str, Tensor]) -> None:
    """Give the embeddings of a copy tables of the rows that were reached; any other row is taken for the next one."""
    for name, rows in reached.items():
        m = copy.get_submodule(name)
        weight: Any = m.weight
        m.weight = nn.Parameter(weight.detach()[rows], requires_grad=weight.requires_grad)
        if m.padding_idx is not None:
            m.padding_idx = int(place(rows, rows.new_tensor(m.padding_idx)))  # type: ignore[assignment]
        m.register_forward_pre_hook(lambda _m, args, rows=rows: (place(rows, args[0]), *args[1:]))


def place(rows: Tensor, ids: Tensor) -> Tensor:
    """Where in ``rows``, which are sorted, each id is.

    >>> place(torch.tensor([0, 1, 40]), torch.tensor([[40, 1]]))
    tensor([[2, 1]])
    """
    return torch.searchsorted(rows, ids.contiguous()).clamp_(max=len(rows) - 1)
