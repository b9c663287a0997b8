"""A weight is rescaled in the middle of a Trainer's run, with a scheduler, and that run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_normreg import EffectiveLRMonitor, accept_rescaled, rescale_
from tests.harness import Net, RecordingLogger, images, trainer

FACTOR, CUT = 3.0, 3


class Rescaling(Net):
    """Multiplies its first weight after its second batch."""

    def __init__(self, factor: float) -> None:
        super().__init__(lambda groups: torch.optim.AdamW(groups, weight_decay=0.1, eps=1e-3))
        self.factor = factor
        self.double()
        self.norm1.eps = 1e-100  # vanishes beside any variance

    def configure_optimizers(self) -> Any:
        """As before, and ready for a checkpoint of this run."""
        made = super().configure_optimizers()
        accept_rescaled(made["optimizer"], [made["lr_scheduler"]["scheduler"]])
        return made

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the second batch of the run."""
        if self.trainer.global_step == 2 and self.factor != 1.0:
            (optimizer,), scheduler = self.trainer.optimizers, self.lr_schedulers()
            rescale_(optimizer, self.conv1.weight, self.factor, schedulers=[scheduler])


def run(
    folder: Path, factor: float, epochs: int, resume: Path | None = None
) -> tuple[dict[str, Tensor], list[tuple[int, dict[str, float]]]]:
    """State of the net at the end, and the logged rows."""
    torch.manual_seed(0)
    net = Rescaling(factor)
    fitted = trainer(EffectiveLRMonitor(), LearningRateMonitor(), max_epochs=epochs)
    fitted.fit(net, DataLoader(images(12, torch.float64), batch_size=4), ckpt_path=resume)
    fitted.save_checkpoint(folder / f"{epochs}.ckpt")
    assert isinstance(fitted.logger, RecordingLogger)
    return net.state_dict(), fitted.logger.rows


def test_directions_go_on_under_a_schedule(tmp_path: Path) -> None:
    """With a scheduler and monitors, directions and effective learning rates are those of the plain run."""
    plain, plain_rows = run(tmp_path, 1.0, 2)
    rescaled, rows = run(tmp_path, FACTOR, 2)
    for name, value in plain.items():
        other = rescaled[name] / FACTOR if name == "conv1.weight" else rescaled[name]
        # BatchNorm's averages of what comes out of the weight are partly from before.
        if not name.startswith("norm1.running"):
            torch.testing.assert_close(other, value, rtol=0.0, atol=1e-12)
    curve = "weights/effective_lr/conv1.weight"
    found = [[row[curve] for _, row in run_rows if curve in row] for run_rows in (plain_rows, rows)]
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_resume(tmp_path: Path) -> None:
    """A run that is saved after the rescaling and loaded into a fresh optimizer ends with the same bits."""
    whole, rows = run(tmp_path, FACTOR, 2)
    run(tmp_path, FACTOR, 1)
    resumed, later = run(tmp_path, FACTOR, 2, resume=tmp_path / "1.ckpt")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    tail = [row for row in rows if row[0] >= CUT and "weights/effective_lr/conv1.weight" in row[1]]
    assert len(tail) == 3
    assert [row for row in later if row[0] >= CUT and "weights/effective_lr/conv1.weight" in row[1]] == tail
