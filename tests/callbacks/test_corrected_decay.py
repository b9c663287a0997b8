"""Decay in proportion to the learning rate, on scale-invariant weights only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_normreg import CorrectedDecay, EffectiveLRMonitor, NormProjection
from lightning_normreg.functional import equilibrium_norm
from tests.callbacks.test_equilibrium import CLOSE, ENTRIES, OPTIMIZERS, Noise, noise
from tests.harness import Net, loader, sgd, trainer

DECAY = 0.5


class OneGroup(Net):
    """All parameters in one group, under a cosine by steps; it keeps the gradients of each step."""

    def configure_optimizers(self) -> Any:
        """One group."""
        optimizer = self.make([{"params": list(self.parameters()), "lr": 0.1, "name": "all"}])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep the gradients."""
        super().optimizer_step(*args, **kwargs)
        if not hasattr(self, "gradients"):
            self.gradients: list[dict[str, Tensor]] = []
        self.gradients.append({n: p.grad.clone() for n, p in self.named_parameters()})


def test_each_step_has_the_corrected_decay() -> None:
    """SGD by hand: w − η(g + λη/η_max·w) for filters, w − η(g + λw) for the rest, to float64 roundoff."""
    net = OneGroup(sgd(weight_decay=DECAY))
    trainer(CorrectedDecay(), precision="64-true").fit(net, loader(dtype=torch.float64))
    shares = set()
    for step, gradients in zip(net.steps, net.gradients, strict=True):
        for name, before in step.before.items():
            lr = step.lr[name]
            share = lr / 0.1 if name in ("conv1.weight", "up.weight") else 1.0
            expected = before - lr * (gradients[name] + DECAY * share * before)
            assert step.after[name] == pytest.approx(expected, rel=1e-13, abs=1e-15), name
            shares.add(share)
    assert len(shares) > 3


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_at_the_peak_nothing_changes(make: Any) -> None:
    """Without a schedule a run is the same, bit for bit, though its one group is split in every step."""
    ends = []
    for callbacks in ([], [CorrectedDecay()]):
        torch.manual_seed(0)
        net = Net(
            lambda groups: make([{"params": [p for g in groups for p in g["params"]]}], weight_decay=DECAY), False
        )
        trainer(*callbacks).fit(net, loader())
        ends.append(net.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_the_groups_are_the_users_own_outside_of_steps(tmp_path: Any) -> None:
    """After each step, in the checkpoint, and after a step that raised."""

    class Fails(OneGroup):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise RuntimeError("no more")
            return super().training_step(batch, batch_idx)

    net = OneGroup(sgd(weight_decay=DECAY, momentum=0.9))
    run = trainer(CorrectedDecay())
    run.fit(net, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    (group,) = torch.load(tmp_path / "end.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["weight_decay"], len(group["params"]), group["name"]) == (DECAY, 8, "all")
    run = trainer(CorrectedDecay(), max_epochs=2)
    run.fit(OneGroup(sgd(weight_decay=DECAY, momentum=0.9)), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert len(run.optimizers[0].param_groups) == 1
    made: list[torch.optim.Optimizer] = []
    failing = Fails(lambda groups: made.append(torch.optim.SGD(groups, weight_decay=DECAY)) or made[0])
    run = trainer(CorrectedDecay())
    with pytest.raises(RuntimeError, match="no more"):
        run.fit(failing, loader())
    (group,) = made[0].param_groups
    assert (group["weight_decay"], len(group["params"])) == (DECAY, 8)


def cosine(optimizer: Any) -> Any:
    """To a hundredth over the run."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2400, eta_min=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_norm_stays_put(name: str) -> None:
    """From equilibrium on the norm stays where it was while the learning rate falls; without the correction it falls.

    The monitor beside it hears of the decay that was really used, so its prediction holds as well.
    """
    settled = {
        "sgd": equilibrium_norm("sgd", lr=0.01, weight_decay=0.1, gradient_norm=(ENTRIES - 1) ** 0.5),
        "adamw": equilibrium_norm("adam_decoupled", lr=1e-2, weight_decay=0.2, entries=ENTRIES),
    }
    ends = {}
    for corrected in (True, False):
        torch.manual_seed(0)
        net = Noise(OPTIMIZERS[name], cosine)
        net.layer.weight.data = settled[name] * torch.nn.functional.normalize(net.layer.weight.data, dim=1)
        start = settled[name]
        monitor = EffectiveLRMonitor(20)
        trainer(monitor, *([CorrectedDecay()] if corrected else [])).fit(net, noise(2400))
        ends[corrected] = net.layer.weight.norm(dim=1).square().mean().sqrt().item() / start
        late = monitor.history()["weights/equilibrium_ratio/layer.weight"].iloc[-20:]
        assert late.mean() == pytest.approx(1.0, abs=CLOSE)
    assert ends[True] == pytest.approx(1.0, abs=CLOSE)
    assert ends[False] < 1 - 2 * CLOSE


def test_errors() -> None:
    """A wrong peak, a weight that is not scale-invariant, nothing that is, an unknown optimizer."""

    class Unknown(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    with pytest.raises(ValueError, match=r"`peak_lr` must be 'auto' or a positive number, got -1"):
        CorrectedDecay(-1)
    with pytest.raises(ValueError, match=r"`include` must name scale-invariant weights, but 'head\.weight'"):
        trainer(CorrectedDecay(include=["*.weight"], exclude=["norm*"])).fit(Net(sgd()), loader())
    with pytest.raises(ValueError, match="CorrectedDecay must know how the optimizer decays, but Unknown"):
        trainer(CorrectedDecay()).fit(Net(Unknown), loader())


def test_beside_a_projection() -> None:
    """Both act on the same weights without getting in each other's way."""
    net = OneGroup(sgd(weight_decay=DECAY))
    trainer(NormProjection(), CorrectedDecay(), EffectiveLRMonitor()).fit(net, loader())
    assert net.conv1.weight.detach().flatten(1).norm(dim=1) == pytest.approx(torch.ones(6), rel=1e-6)
