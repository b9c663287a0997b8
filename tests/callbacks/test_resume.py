"""Resume, bit for bit, with all three callbacks, each beside a control run without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_normreg import CorrectedDecay, EffectiveLRMonitor, NormProjection, WeightNormMonitor
from tests.harness import Net, RecordingLogger, images, sgd, trainer


class StatefulLoader(DataLoader[Any]):
    """Unshuffled batches; it remembers how many it has handed out, and goes on from there once."""

    def __init__(self) -> None:
        super().__init__(images(12), batch_size=4)
        self.done = self.skip = 0

    def __iter__(self) -> Any:
        skip, self.skip = self.skip, 0
        self.done = skip
        for i, batch in enumerate(super().__iter__()):
            if i >= skip:
                self.done += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches handed out in this epoch."""
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after them."""
        self.skip = state["done"]


def callbacks(radius: Any, interval: Any) -> list[Any]:
    """All three."""
    return [
        WeightNormMonitor(logging_interval=interval),
        EffectiveLRMonitor(logging_interval=interval),
        NormProjection(radius, include=["conv1.weight", "up.weight"]),
    ]


def run(folder: Any, extra: list[Any], epochs: int, resume: Any = None, stateful: bool = False) -> Any:
    """Train, saving a checkpoint after every step."""
    torch.manual_seed(0)
    net = Net(lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1))
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fitted = trainer(*extra, saver, max_epochs=epochs, enable_checkpointing=True)
    data = StatefulLoader() if stateful else DataLoader(images(12), batch_size=4)
    fitted.fit(net, data, ckpt_path=resume)
    fitted.save_checkpoint(folder / "end.ckpt")
    logger = fitted.logger
    assert isinstance(logger, RecordingLogger)
    return net.state_dict(), logger.rows


@pytest.mark.pitfall(19)
@pytest.mark.filterwarnings(
    # Lightning on a checkpoint folder that the first half of the run has filled, and on resuming inside an epoch.
    "ignore:Checkpoint directory",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("radius", ["auto", "initial", None], ids=["auto", "initial", "control"])
@pytest.mark.parametrize("cut, stateful", [(3, False), (4, True)], ids=["epoch-end", "mid-epoch"])
def test_two_epochs_equal_one_saved_loaded_and_one(
    tmp_path: Any, radius: Any, interval: Any, cut: int, stateful: bool
) -> None:
    """Weights, buffers and every logged value after the cut are the same bits."""

    def extra() -> list[Any]:
        return [] if radius is None else callbacks(radius, interval)

    whole, rows = run(tmp_path / "whole", extra(), 2, stateful=stateful)
    run(tmp_path / "half", extra(), 1 if cut == 3 else 2, stateful=stateful)
    checkpoint = tmp_path / "half" / ("end.ckpt" if cut == 3 else f"step={cut}.ckpt")
    resumed, later = run(tmp_path / "half", extra(), 2, resume=checkpoint, stateful=stateful)

    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    tail = [row for row in rows if row[0] >= cut]
    assert [row for row in later if row[0] >= cut] == tail
    assert bool(tail) == (radius is not None)


@pytest.mark.pitfall(18)
def test_state_is_of_plain_types(tmp_path: Any) -> None:
    """The checkpoint loads with ``weights_only=True``, radii and running means included."""
    run(tmp_path, callbacks("initial", "epoch"), 1)
    states = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]
    mine = {key.partition("{")[0]: state for key, state in states.items() if "include" in key}
    assert set(mine["NormProjection"]["initial"]) == {"conv1.weight", "up.weight"}
    # 3 curves of 3 layers, 2 summaries of 3, and the timescales of 2 groups.
    assert len(mine["EffectiveLRMonitor"]["sums"]) == 3 * 3 + 2 * 3 + 2
    assert set(mine["EffectiveLRMonitor"]["first"]) == {"conv1.weight", "up.weight"}


@pytest.mark.pitfall(4)
def test_settings_are_those_of_the_groups_as_they_are_now() -> None:
    """A state that is loaded in the middle of a run puts other dictionaries in their place, with other settings."""

    class Reload(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                (optimizer,) = trainer.optimizers
                state = optimizer.state_dict()
                for group in state["param_groups"]:
                    group["lr"] *= 7
                before = optimizer.param_groups
                optimizer.load_state_dict(state)
                assert all(old is not new for old, new in zip(before, optimizer.param_groups, strict=True))

    net = Net(sgd(momentum=0.9, weight_decay=0.1), schedule=False)
    monitor = EffectiveLRMonitor()
    run_of_six = trainer(Reload(), monitor, NormProjection(include=["conv1.weight"]), CorrectedDecay())
    run_of_six.fit(net, DataLoader(images(), batch_size=4))
    # At radius 1 it is the learning rate, in float32.
    assert monitor.history()["weights/effective_lr/conv1.weight"].tolist() == pytest.approx(
        [1e-3] * 2 + [7e-3] * 4, rel=1e-6
    )
    assert [group["lr"] for group in run_of_six.optimizers[0].param_groups] == pytest.approx([7e-3, 21e-3])


def test_a_second_fit_starts_afresh() -> None:
    """The same callback in a second run forgets the first one's reference and history."""
    monitor = EffectiveLRMonitor()
    for _ in range(2):
        torch.manual_seed(0)
        trainer(monitor, max_epochs=1).fit(Net(sgd()), DataLoader(images(12), batch_size=4))
        assert len(monitor.history()) == 3
        assert monitor.history()["weights/layers/effective_lr_ratio_max"].iloc[0] == 1.0
