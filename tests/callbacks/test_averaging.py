"""Averaged weights: said to be off the sphere, or put back on it where they are used; the average itself goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_normreg import NormProjection
from tests.harness import Net, images, loader, trainer

LEAVES = "averages weights that NormProjection holds"
DECAY = 0.7
NAMES = ("conv1.weight", "up.weight")


class Validated(Net):
    """Learns fast, in float64, and remembers the weights that it is validated with."""

    def __init__(self) -> None:
        super().__init__(lambda groups: torch.optim.SGD([p for g in groups for p in g["params"]], lr=0.5), False)
        self.double()
        self.seen: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Look."""
        self.seen.append({n: p.detach().clone() for n, p in self.named_parameters()})

    def val_dataloader(self) -> Any:
        """One batch."""
        return loader(24, dtype=torch.float64)


def fit(*callbacks: Any, epochs: int = 2, resume: Path | None = None, **options: Any) -> tuple[Validated, Any]:
    """The net after some epochs of 3 batches, and the run."""
    torch.manual_seed(0)
    net = Validated()
    run = trainer(*callbacks, max_epochs=epochs, num_sanity_val_steps=1, precision="64-true", **options)
    run.fit(net, DataLoader(images(12, torch.float64), batch_size=4), ckpt_path=resume)
    return net, run


def norms(name: str, weight: Tensor) -> Tensor:
    """Of its neurons; the transposed convolution has four, in two groups."""
    rows = weight.flatten(1) if name == "conv1.weight" else weight.unflatten(0, (2, 3)).transpose(1, 2).flatten(0, 1)
    return rows.flatten(1).norm(dim=1)


def off(weights: dict[str, Tensor]) -> float:
    """Largest distance from the radius 1."""
    return max((norms(name, weights[name]) - 1).abs().max().item() for name in NAMES)


def moving_average(net: Validated) -> dict[str, Tensor]:
    """The EMA of the weights after each step: the first one as it is, then 0.7 of the old and 0.3 of the new."""
    average = dict(net.steps[0].after)
    for step in net.steps[1:]:
        average = {n: DECAY * average[n] + (1 - DECAY) * step.after[n] for n in average}
    return average


def test_without_the_argument_it_is_said() -> None:
    """The averages are off by more than 1e-4; the control of this module."""
    with pytest.warns(UserWarning, match=f"EMAWeightAveraging {LEAVES}"):
        net, _ = fit(EMAWeightAveraging(decay=DECAY), NormProjection())
    assert off(dict(net.named_parameters())) > 1e-4
    assert off(net.seen[-1]) > 1e-4


@pytest.mark.pitfall(20)
def test_an_average_is_projected_where_it_is_used(tmp_path: Path) -> None:
    """In validation, in the checkpoint and at the end; what is averaged are the weights of the steps, as without it.

    At the end each unit is the oracle's, divided by its norm: projecting what is looked at has not changed the average.
    """
    averaging = EMAWeightAveraging(decay=DECAY)
    net, run = fit(averaging, NormProjection(project_averaged=True))
    run.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert len(net.seen) == 3  # one of them in the sanity check, before anything is known
    for weights in (*net.seen[1:], state, dict(net.named_parameters())):
        assert off(weights) < 1e-12
    expected = moving_average(net)
    assert off(expected) > 1e-4
    directions = expected["conv1.weight"] / norms("conv1.weight", expected["conv1.weight"]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(net.conv1.weight.detach(), directions, rtol=0, atol=1e-13)
    for name, value in averaging._average_model.module.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the checkpoint callback, left out
def test_a_resumed_average_is_the_one_that_was_saved(tmp_path: Path) -> None:
    """Also bit for bit, though the checkpoint's own state has it projected."""

    def callbacks() -> list[Any]:
        return [EMAWeightAveraging(decay=DECAY), NormProjection(project_averaged=True)]

    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, _ = fit(*callbacks(), saver, enable_checkpointing=True)
    resumed, _ = fit(*callbacks(), resume=tmp_path / "epoch=0.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.pitfall(20)
@pytest.mark.parametrize("averaged", [False, True])
def test_stochastic_weight_averaging(averaged: bool) -> None:
    """It copies its average into the module, for one more epoch of BatchNorm statistics and for good."""
    swa = StochasticWeightAveraging(0.5, swa_epoch_start=1, annealing_epochs=1)
    seen: list[dict[str, Tensor]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 3:
                seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    callbacks = [swa, NormProjection(project_averaged=averaged), Look()]
    if averaged:
        net, _ = fit(*callbacks, epochs=3)
    else:
        with pytest.warns(UserWarning, match=f"StochasticWeightAveraging {LEAVES}"):
            net, _ = fit(*callbacks, epochs=3)
    for weights in (seen[0], dict(net.named_parameters())):
        assert (off(weights) < 1e-12) is averaged


def test_the_average_of_another_precision_or_device() -> None:
    """``WeightAveraging`` itself, equal weights, with a subclass that averages once an epoch."""

    class Epochs(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None

    net, _ = fit(Epochs(device="cpu"), NormProjection(2.0, project_averaged=True), epochs=3)
    ends = [net.steps[i].after["conv1.weight"] for i in (2, 5, 8)]
    mean = torch.stack(ends).mean(dim=0)
    directions = 2 * mean / norms("conv1.weight", mean).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(net.conv1.weight.detach(), directions, rtol=0, atol=1e-12)


def test_nothing_to_project_and_the_wrong_order() -> None:
    """Both are errors before the first step, with the way out."""
    with pytest.raises(ValueError, match="`project_averaged` must have an average to project"):
        fit(NormProjection(project_averaged=True))
    with pytest.raises(ValueError, match=r"EMAWeightAveraging comes after NormProjection\. Put NormProjection"):
        fit(NormProjection(project_averaged=True), EMAWeightAveraging(decay=DECAY))


@pytest.mark.pitfall(10)
def test_weights_that_somebody_else_writes() -> None:
    """An average of one's own, or clipping: the norms at hand tell, once, and name the weight."""

    class Clip(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                pl_module.conv1.weight.clamp_(-0.2, 0.2)

    with pytest.warns(
        UserWarning, match=r"'conv1\.weight' has 6 displaced units of 6: it does not stay at its radius"
    ) as caught:
        fit(NormProjection(), Clip())
    assert len([w for w in caught if "does not stay" in str(w.message)]) == 1
