"""Sharded models asked in place, for :mod:`tests.symmetries.test_sharded`, in processes that start once for all models.

``python in_place_processes.py WORLD FOLDER`` writes what each process found: verdicts by strategy and architecture, and
what had changed after a probe of a module that keeps all kinds of state.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_normreg import find_scale_invariance, find_symmetries, parameter_roles
from lightning_normreg._symmetries import ProbeError
from lightning_normreg._weights import local
from tests.symmetries import _symmetry_case
from tests.symmetries import _symmetry_cases as _symmetry_cases
from tests.symmetries._case import CASES, Case
from tests.symmetries._cases import CASES as ALL
from tests.symmetries._labels import label
from tests.symmetries._transformers_cases import PRETRAINED, own_loss
from tests.symmetries.test_transformers import expand

SOME = [
    "linear_layernorm", "linear_rmsnorm", "cosine_loss", "qk_norm_attention_with_bias", "sandwich_norm",
    "post_norm_transformer",
]  # fmt: skip
WITH_CONVOLUTIONS = [*SOME, "transposed_convolution_in_groups", "batchnorm_cnn_with_bias", "normalized_columns"]
ONE_GROUP = ["two_embeddings_layernorm", "l2_inside_the_loss"]
"""Weights of children are read where these do not run, so that FSDP must not spread them by themselves."""


def pretrained(name: str) -> Case:
    """A model of ``transformers``."""
    model, batch, labels = PRETRAINED[name]()
    return Case(model.train(), batch, own_loss, expand(labels, list(parameter_roles(model))))


def fsdp2(module: nn.Module, *shape: int, one_group: bool = False, **options: Any) -> nn.Module:
    """Each child a group of its own, and the rest another; what has no dimension is not spread."""
    options |= {
        "mesh": init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :]),
        "ignored_params": {p for p in module.parameters() if not p.ndim},
    }
    uses = [id(p) for child in module.children() for p in set(child.parameters())]
    for child in () if one_group else module.children():
        own = {p for p in child.parameters() if p.ndim}
        if own and all(uses.count(id(p)) == 1 for p in own):
            fully_shard(child, **options)
    return fully_shard(module, **options)


def fsdp1(module: nn.Module, **options: Any) -> nn.Module:
    """All of it in one long vector."""
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True, **options)


def tensor_parallel(module: nn.Module) -> nn.Module:
    """Linear layers by columns and rows in turn, each with its whole output."""
    linear = [name for name, part in module.named_modules() if type(part) is nn.Linear and name]
    kinds: list[Any] = [ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())]
    plan = {name: kinds[number % 2] for number, name in enumerate(linear)}
    return parallelize_module(module, init_device_mesh("cpu", (2,)), plan)


STRATEGIES: dict[int, dict[str, tuple[list[str], Callable[[nn.Module], nn.Module]]]] = {
    2: {
        "fsdp2": ([name for name in ALL if name not in ONE_GROUP], lambda m: fsdp2(m, 2)),
        "fsdp2 whole": (ONE_GROUP, lambda m: fsdp2(m, 2, one_group=True)),
        "fsdp2, transformers": (list(PRETRAINED), lambda m: fsdp2(m, 2, one_group=True)),
        "fsdp2, same samples": (SOME, lambda m: fsdp2(m, 2)),
        "fsdp1": (WITH_CONVOLUTIONS, fsdp1),
        "tp, same samples": (SOME, tensor_parallel),
    },
    4: {"hsdp": (SOME, lambda m: fsdp2(m, 2, 2))},
}
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
NARROW = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
KEEPING = {
    2: {
        "fsdp2": lambda m: fsdp2(m, 2),
        "fsdp2 in bfloat16": lambda m: fsdp2(m, 2, mp_policy=POLICY),
        "fsdp1": fsdp1,
        "fsdp1 in bfloat16": lambda m: fsdp1(m, mixed_precision=NARROW),
        "tp": tensor_parallel,
    },
    4: {"hsdp": lambda m: fsdp2(m, 2, 2)},
}
SYMMETRIC = {
    2: {"fsdp2": ["pre_norm", "normalized_attention", "batch_norm"], "tp": ["pre_norm", "gated"], "fsdp1": ["gated"]},
    4: {"hsdp": ["pre_norm"]},
}


def built(name: str, rank: int) -> Case:
    """The same model everywhere, and samples of its own for each process."""
    make = partial(pretrained, name) if name in PRETRAINED else CASES[name]
    torch.manual_seed(0)
    case = make()
    torch.manual_seed(1 + rank)
    return case._replace(batch=make().batch)


def bits(module: nn.Module) -> dict[str, Tensor]:
    """What this process holds of weights and buffers."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: local(t).clone() for name, t in tensors}


def asked(name: str, rank: int, spread: Callable[[nn.Module], nn.Module], alike: bool) -> dict[str, Any]:
    """Labels of an architecture, whether its bits are those from before, and eps shares beside those of a copy."""
    case = built(name, 0 if alike else rank)
    module = spread(case.module)
    before = bits(module)
    verdicts = find_scale_invariance(module, case.batch, forward=case.loss)
    shares: list[Any] = []
    if alike:
        whole = built(name, 0)
        expected = find_scale_invariance(whole.module, whole.batch, forward=whole.loss, dtype="float32")
        shares = [(v.rho_worst, verdicts[n].rho_worst) for n, v in expected.items()]
    kept = all(torch.equal(before[key], t) for key, t in bits(module).items())
    return {
        "labels": {n: label(v) for n, v in verdicts.items()},
        "expected": case.labels,
        "kept": kept,
        "shares": shares,
    }


def found_symmetries(spread: Callable[[nn.Module], nn.Module], names: list[str]) -> dict[str, Any]:
    """All scaling symmetries of some architectures, spread and of a copy on one device; and whether bits are kept."""
    found = {}
    for name in names:
        parts = []
        for _ in range(2):
            torch.manual_seed(0)
            labelled = _symmetry_case.CASES[name]()
            parts.append(labelled.model.train())
        alone, module = parts[0], spread(parts[1])
        before = bits(module)
        how: dict[str, Any] = {"forward": _symmetry_case.log_loss, "progress": False}
        mine, one = (find_symmetries(m, labelled.batch, **how) for m in (module, alone))
        kept = all(torch.equal(before[key], t) for key, t in bits(module).items())
        basis = [[replace(symmetry, eps_share=None) for symmetry in s.basis] for s in (mine, one)]
        equal = basis[0] == basis[1] and (mine.tensors, mine.inert) == (one.tensors, one.inert)
        shares = [[symmetry.eps_share for symmetry in s.basis] for s in (mine, one)]
        found[name] = {"equal": equal, "kept": kept, "shares": shares}
    return found


class Keeping(nn.Module):
    """Counts its calls, in an attribute, a list and a buffer, and draws from all generators."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)
        self.register_buffer("size", torch.zeros(8))
        self.calls, self.seen, self.numpy = 0, [0], np.random.default_rng(0)
        self.raises = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits; may raise in the middle."""
        self.calls += 1
        self.seen.append(self.calls)
        x = self.norm(self.first(x)) * (1 + 0.1 * self.calls)
        self.size += x.detach().square().mean(0)
        if self.raises:
            raise ValueError("in the middle")
        noise = random.random() + np.random.rand() + self.numpy.random() + torch.rand(())
        return self.last(F.dropout(x.tanh(), 0.1)) * (1 + noise)


def states(module: Any) -> list[Any]:
    """Everything that a probe must not move, other than tensors of the module."""
    numpy = np.random.get_state()[1].tolist()
    own = module.numpy.bit_generator.state
    return [module.calls, list(module.seen), own, torch.get_rng_state().tolist(), numpy, str(random.getstate())]


def trained(module: nn.Module, x: Tensor) -> list[Any]:
    """Loss and gradients of a training step."""
    module.zero_grad()
    loss = module(x).exp().mean()
    loss.backward()
    return [loss.item(), *(local(p.grad).tolist() for p in module.parameters() if p.grad is not None)]


def keeps(spread: Callable[[nn.Module], nn.Module], raises: bool, **options: Any) -> dict[str, Any]:
    """What a probe leaves as it was; the training step after it is that of a module that was never asked."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    inner, other = Keeping(), Keeping()
    module, twin = spread(inner), spread(other)
    if raises:  # after a step: with gradients, and all that was set up for it
        for each in (module, twin):
            torch.manual_seed(1), random.seed(1), np.random.seed(1)
            trained(each, x)
    gradients = [(p, p.grad, None if p.grad is None else local(p.grad).clone()) for p in module.parameters()]
    seen, before, state = inner.seen, bits(module), states(inner)
    inner.raises = raises
    why, verdicts = "", {}
    try:
        verdicts = find_scale_invariance(module, x, forward=lambda m, x: m(x).exp().mean(), **options)
    except ProbeError as error:
        why = str(error)
    inner.raises = False
    found = {
        "why": why,
        "labels": {n: label(v) for n, v in verdicts.items()},
        "bits": all(torch.equal(before[key], t) for key, t in bits(module).items()),
        "states": states(inner) == state and inner.seen is seen,
        "gradients": all(p.grad is g and (g is None or torch.equal(local(g), b)) for p, g, b in gradients),
    }
    steps = []
    for each in (module, twin):
        torch.manual_seed(2), random.seed(2), np.random.seed(2)
        steps.append(trained(each, x))
    return found | {"step": steps[0] == steps[1]}


def work(rank: int, world: int, folder: str) -> None:
    """All of it, on one process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found: dict[str, Any] = {"kept": {}}
    for strategy, (names, spread) in STRATEGIES[world].items():
        found[strategy] = {name: asked(name, rank, spread, alike="same" in strategy) for name in names}
    found["symmetries"] = {
        strategy: found_symmetries(KEEPING[world][strategy], names) for strategy, names in SYMMETRIC[world].items()
    }
    for strategy, spread in KEEPING[world].items():
        for raises in (False, True):
            found["kept"][f"{strategy}, {'raises' if raises else 'passes'}"] = keeps(spread, raises)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    count = int(sys.argv[1])
    mp.spawn(work, args=(count, sys.argv[2]), nprocs=count)
