"""A checkpoint that was written with other parameter groups is resumed, with the state of each parameter its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_normreg import DecayGroupsMixin, EffectiveLRMonitor
from tests.harness import Net, images, trainer

LR, DECAY = 1e-2, 0.1


class Plain(Net):
    """All parameters in one group, with a schedule of two schedulers in a row."""

    def __init__(self) -> None:
        super().__init__(lambda groups: torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY))

    def groups(self) -> Any:
        """One."""
        return self.parameters()

    def configure_optimizers(self) -> Any:
        """Warm-up, then decay, at every step."""
        optimizer = self.make(self.groups())
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
        cool = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cool], milestones=[2])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Grouped(DecayGroupsMixin, Plain):
    """One group per role, all of them decaying alike, so that a step is that of one group."""

    def groups(self) -> Any:
        """Weights, gains, shifts and biases."""
        return self.decay_groups(DECAY, gamma=DECAY, beta=DECAY, bias=DECAY)


class Function(Plain):
    """The same groups in another order, from a model that knows nothing of the mixin."""

    def groups(self) -> Any:
        """Every parameter but the first has a group of its own, last ones first."""
        first, *rest = [{"params": [pair]} for pair in self.named_parameters()]
        return [*rest[::-1], first]


def run(net: Net, epochs: int, folder: Path, *callbacks: Any, resume: Path | None = None) -> dict[str, Tensor]:
    """Parameters at the end; 3 batches an epoch."""
    fitted = trainer(*callbacks, max_epochs=epochs)
    fitted.fit(net, DataLoader(images(12), batch_size=4), ckpt_path=resume)
    fitted.save_checkpoint(folder / "end.ckpt")
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def fresh(make: Any) -> Net:
    """The same weights each time."""
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize(
    "before, after, callbacks",
    [
        (Plain, Grouped, []),
        (Plain, Function, [EffectiveLRMonitor()]),
        (Grouped, Plain, [EffectiveLRMonitor()]),
        (Function, Grouped, []),
        (Function, Grouped, [EffectiveLRMonitor()]),
    ],
    ids=["mixin", "callback", "back-to-one-group", "many-to-roles", "both"],
)
def test_going_on_with_other_groups_is_going_on(before: Any, after: Any, callbacks: list[Any], tmp_path: Path) -> None:
    """Where all groups decay alike the parameters are those of a run that never changed its groups, bit for bit.

    A state that is mapped by position would give moments of one parameter to another. The schedule, with an entry for
    each group, goes on as well.
    """
    whole = run(fresh(before), 2, tmp_path)
    run(fresh(before), 1, tmp_path)
    resumed = run(fresh(after), 2, tmp_path, *callbacks, resume=tmp_path / "end.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_decay_is_as_configured_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The learning rate is the checkpoint's, the decay of each group this run's, and it is said once."""

    class NewDecay(Grouped):
        def groups(self) -> Any:
            return self.decay_groups(0.5)

    run(fresh(Plain), 1, tmp_path)
    net = fresh(NewDecay)
    with caplog.at_level("INFO"):
        run(net, 2, tmp_path, EffectiveLRMonitor(), resume=tmp_path / "end.ckpt")
    groups = net.trainer.optimizers[0].param_groups
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0, 0.0, 0.0]
    assert [g["lr"] for g in groups] == pytest.approx([LR * 0.9**4] * 4, rel=1e-12)
    said = [r.getMessage() for r in caplog.records if "was loaded by name" in r.getMessage()]
    assert said == [
        "The checkpoint's AdamW has 1 parameter groups, this run's has 4: its state was loaded by name, and decay is "
        "as configured now."
    ]


def test_a_state_that_cannot_be_mapped_names_the_way_out(tmp_path: Path) -> None:
    """Two groups without names, or one with other parameters: an error in place of torch's, before the first step."""

    class Two(Plain):
        def groups(self) -> Any:
            everything = list(self.parameters())
            return [{"params": everything[:2]}, {"params": everything[2:]}]

    class Larger(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    for before in (Two, Larger):
        run(fresh(before), 1, tmp_path)
        checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
        checkpoint["state_dict"] = fresh(Grouped).state_dict()
        torch.save(checkpoint, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match="Configure the groups of the run that wrote it, or load the"):
            run(fresh(Grouped), 2, tmp_path, resume=tmp_path / "other.ckpt")


def test_groups_that_would_have_to_be_joined(tmp_path: Path) -> None:
    """Parameters at different learning rates cannot go into one group."""

    class Rates(Plain):
        def groups(self) -> Any:
            first, *rest = self.named_parameters()
            return [{"params": [first], "lr": 1.0}, {"params": rest}]

    run(fresh(Rates), 1, tmp_path)
    with pytest.raises(ValueError, match=r"must come from saved groups with the same settings, but 'conv1\.weight'"):
        run(fresh(Grouped), 2, tmp_path, resume=tmp_path / "end.ckpt")
