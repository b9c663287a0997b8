"""Tables of units that are spread over two processes, for :mod:`tests.weights.test_spread`.

``python spread.py FOLDER`` writes what each process found, one case after the other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_normreg._weights import ParameterRole, Table, Watched
from lightning_normreg._weights._watched import Part
from tests.weights.test_table import SHAPES, made, oracle

PLACEMENTS = {
    "rows": [Shard(0), Shard(0), Shard(0)],
    "columns": [Shard(1), Shard(1), Shard(0)],
    "some of them": [Shard(0), Replicate(), Replicate()],
}
CASES = [(name, angle, radial) for name in PLACEMENTS for angle, radial in ((1e-3, 1000.0), (1e-5, 1.0), (0.3, 0.0))]


def work(rank: int, folder: str) -> None:
    """All cases on one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    reductions = 0
    plain = dist.all_reduce

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal reductions
        reductions += 1
        return plain(*args, **options)

    dist.all_reduce = counting
    found = []
    for name, angle, radial in CASES:
        before, after = made(angle, radial, torch.float32)
        placements = PLACEMENTS[name]
        pairs = [
            [distribute_tensor(x.clone(), mesh, [p]) for x, p in zip(v, placements, strict=True)]
            for v in (before, after)
        ]
        tensors = [nn.Parameter(x) for x in pairs[1]]
        copies: dict[Tensor, Tensor] = {p: x.to_local() for p, x in zip(tensors, pairs[0], strict=True)}
        whole = Watched("set", tensors[0], ParameterRole("weight", "", ""), (Part("layer"),), tuple(tensors[1:]))
        rows = Watched("rows", tensors[0], ParameterRole("weight", "", ""), (Part("neuron"),))
        with torch.no_grad():
            table = Table([whole, rows])
            reductions = 0
            lengths = table.lengths(copies.__getitem__)
            measured = reductions
            table = Table([whole])
            reductions = 0
            table.project(2.0)
            projected = reductions
            table = Table([rows])
            reductions = 0
            table.project(3.0)
        norm, turned, _ = oracle(before, after)
        found.append(
            {
                "case": [name, angle, radial],
                "norm": lengths.norm[0].item() / norm,
                "rotation": lengths.rotation()[0].item() / turned,
                "rows": (lengths.norm[1:] / before[0].double().norm(dim=1)).tolist(),
                "reductions": [measured, projected, reductions],
                "after": [p.full_tensor().double().norm(dim=1).tolist() for p in tensors[:1]],
                "others": sum(p.full_tensor().double().square().sum().item() for p in tensors[1:]),
                "expected": sum(x.double().square().sum().item() for x in after[1:])
                * 4
                / sum(x.double().square().sum().item() for x in after),
            }
        )
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    assert len(SHAPES) == len(PLACEMENTS["rows"])
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
