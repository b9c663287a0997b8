"""Two real processes under DDP give the numbers of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys, torch, warnings
warnings.simplefilter("ignore")
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from pytorch_lightning import LightningModule, Trainer
from lightning_normreg import EffectiveLRMonitor, NormProjection, WeightNormMonitor

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), getattr(nn, sys.argv[3])(16), nn.ReLU(), nn.Linear(16, 4))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

world = int(sys.argv[1])
torch.manual_seed(0)
x, y = torch.randn(48, 8), torch.randint(4, (48,))
model = Model()
rank = int(__import__("os").environ.get("LOCAL_RANK", 0))
# The same global batches of 8: each rank takes its half of every batch.
order = torch.arange(48).view(6, world, 8 // world)[:, rank].flatten()
data = DataLoader(TensorDataset(x[order], y[order]), batch_size=8 // world)
monitor = EffectiveLRMonitor()
trainer = Trainer(accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=2,
    log_every_n_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, use_distributed_sampler=False,
    callbacks=[WeightNormMonitor(), monitor, NormProjection()])
trainer.fit(model, data)
values = {k: v.item() for k, v in trainer.callback_metrics.items()}
values["parameters"] = [p.tolist() for p in model.parameters()]
values["joint_norm"] = torch.cat([p.flatten() for p in model.net[0].parameters()]).norm().item()
with open(f"{sys.argv[2]}/{world}-{rank}.json", "w") as file:
    json.dump([values, monitor.history().to_dict("records")], file)
"""


def run(world: int, folder: Path, norm: str = "LayerNorm") -> list[Any]:
    """What each rank ends with."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(world), str(folder), norm]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.pitfall(28)
def test_ddp_gives_the_numbers_of_one_process(tmp_path: Path) -> None:
    """Key sets are the same on both ranks and the values those of one process.

    The averaged gradient is the same sum in another order; 12 AdamW steps spread its 6e-8 to less than 1e-5.
    """
    (one, history), *_ = run(1, tmp_path)
    first, second = run(2, tmp_path)
    assert first == second
    values, rows = first
    for found in (one, values):
        del found["parameters"]
    assert values.keys() == one.keys()
    assert values == {key: pytest.approx(value, rel=1e-5) for key, value in one.items()}
    assert values["joint_norm"] == pytest.approx(4.0, rel=1e-6)  # √16 neurons, their bias included
    assert len(rows) == len(history) == 12
    for row, expected in zip(rows, history, strict=True):
        assert row == {key: pytest.approx(value, rel=1e-5, nan_ok=True) for key, value in expected.items()}


@pytest.mark.slow
def test_ranks_that_see_other_batches_stay_together(tmp_path: Path) -> None:
    """Each rank has BatchNorm statistics of its own, but one set of gains follows the first projection."""
    (first, _), (second, _) = run(2, tmp_path, "BatchNorm1d")
    assert first["parameters"] == second["parameters"]
    gains = first["parameters"][2]
    assert all(gain != 1.0 for gain in gains)
