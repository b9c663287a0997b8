"""Sharded models asked in place, for :mod:`tests.symmetries.test_sharded`, in processes that start once for all models.

``python in_place_processes.py WORLD FOLDER`` writes what each process found, by strategy and architecture.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_normreg import find_scale_invariance
from lightning_normreg._weights import local
from tests.symmetries._case import Case
from tests.symmetries._cases import CASES
from tests.symmetries._labels import label

WRITTEN = {
    "qk_norm_attention": {"attention.qkv": "column", "attention.out": "row", "up": "column", "down": "row"},
}


def built(name: str, rank: int) -> Case:
    """The same model everywhere, and samples of its own for each process."""
    torch.manual_seed(0)
    case = CASES[name]()
    torch.manual_seed(1 + rank)
    return case._replace(batch=CASES[name]().batch)


def fsdp2(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Each child a group of its own, and the rest another; what has no dimension is not spread."""
    ignored = {p for p in module.parameters() if p.ndim == 0}
    uses = [id(p) for child in module.children() for p in set(child.parameters())]
    for child in module.children():
        if all(uses.count(id(p)) == 1 for p in child.parameters()) and any(p.ndim for p in child.parameters()):
            fully_shard(child, mesh=mesh, ignored_params=ignored)
    return fully_shard(module, mesh=mesh, ignored_params=ignored)


def main_of(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name in sys.argv[3:] or CASES:
        case = built(name, rank)
        try:
            module = fsdp2(case.module, mesh)
            before = {k: local(t).clone() for k, t in module.state_dict().items()}
            verdicts = find_scale_invariance(module, case.batch, forward=case.loss)
            assert all(torch.equal(before[k], local(t)) for k, t in module.state_dict().items())
            found[name] = {n: label(v) for n, v in verdicts.items()}
            bad = {
                n: (case.labels.get(n, "none"), label(v), v.z)
                for n, v in verdicts.items()
                if label(v) != case.labels.get(n, "none")
            }
        except Exception as e:
            bad = "".join(traceback.format_exception(e)[-3:])[-1500:]
        if rank == 0:
            print(name, bad or "ok", flush=True)


if __name__ == "__main__":
    mp.spawn(main_of, args=(int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]))
