"""Corrected decay beside code that reads and writes the optimizer's groups, against steps computed by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import CorrectedDecay, find_scale_invariance
from tests.harness import trainer

STEPS, DECAY, BASE = 12, 0.5, 0.02
TARGETS = ("first.weight", "second.weight")


def data(epochs: int = 1) -> DataLoader[Any]:
    """Vectors with labels, in float64; 12 batches over all epochs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * STEPS // epochs, 6, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(3, (len(x),), generator=generator)), 8)


class Watching(LightningModule):
    """Two layers behind BatchNorm and a head, under AdamW; each hook notes the groups that it sees."""

    def __init__(self, schedule: Callable[[Any], Any] | None = None, *, lr: float = BASE, make: Any = AdamW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm1 = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.second, self.norm2 = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.schedule, self.lr, self.make = schedule, lr, make
        self.seen: list[tuple[str, list[Any]]] = []
        self.done: list[dict[str, Any]] = []

    def note(self, hook: str) -> None:
        """What the groups are now, the list itself first."""
        groups = self.trainer.optimizers[0].param_groups
        self.seen.append((hook, [id(groups), *((id(g), g["weight_decay"], len(g["params"])) for g in groups)]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.norm1(self.first(x)))
        return self.head(torch.relu(self.norm2(self.second(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        self.note("training_step")
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Two groups, both with weights of either kind."""
        first = [*self.first.parameters(), *self.norm1.parameters()]
        rest = [*self.second.parameters(), *self.norm2.parameters(), *self.head.parameters()]
        groups = [{"params": first}, {"params": rest, "lr": self.lr / 2}]
        optimizer = self.make(groups, lr=self.lr, weight_decay=DECAY)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step", "monitor": "loss"}]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Keep what a step by hand needs, and what came out."""
        self.note("before the step")
        names = dict(self.named_parameters())
        states = self.trainer.optimizers[0].state
        before = {
            n: (p.detach().clone(), {k: v.clone() for k, v in states.get(p, {}).items()}) for n, p in names.items()
        }
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.note("after the step")
        settings = {n: g for n, p in names.items() for g in optimizer.param_groups if any(p is q for q in g["params"])}
        settings = {n: {k: v for k, v in g.items() if k != "params"} for n, g in settings.items()}
        after = {n: (p.detach().clone(), p.grad.clone()) for n, p in names.items() if p.grad is not None}
        self.done.append({"before": before, "after": after, "settings": settings})


def _noting(name: str) -> Any:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.note(name)
        return getattr(super(Watching, self), name)(*args, **kwargs)

    return hook


_HOOKS = """
    on_train_batch_start on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step
    configure_gradient_clipping on_train_batch_end on_train_epoch_end on_save_checkpoint
"""
for _name in _HOOKS.split():
    setattr(Watching, _name, _noting(_name))


class Beside(Callback):
    """A callback of the user's that looks as well, and registers hooks on the optimizer after all others."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Hooks that note the groups."""
        trainer.optimizers[0].register_step_pre_hook(lambda *_: pl_module.note("pre-hook"))
        trainer.optimizers[0].register_step_post_hook(lambda *_: pl_module.note("post-hook"))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Look."""
        pl_module.note("callback")


def fit(net: Watching, *callbacks: Any, **options: Any) -> None:
    """12 steps in float64."""
    verdict = options.pop("verdict", None) or known()
    found = [c(invariance=verdict) if isinstance(c, type) and issubclass(c, CorrectedDecay) else c for c in callbacks]
    trainer(*found, precision="64-true", **options).fit(net, data(options.get("max_epochs", 1)))


def known() -> Any:
    """What is scale-invariant in the network: the weights of the first two layers."""

    class Plain(Watching):
        def note(self, hook: str) -> None:
            """Nobody looks."""

    return find_scale_invariance(
        Plain(), next(iter(data())), forward=lambda m, b: nn.functional.cross_entropy(m(b[0].float()), b[1])
    )


def adamw(before: tuple[Tensor, Any], gradient: Tensor, group: Any, decay: float) -> Tensor:
    """One step by the equations of Loshchilov and Hutter."""
    weight, state = before
    (b1, b2), lr = group["betas"], group["lr"]
    t = float(state["step"]) + 1 if state else 1.0
    m = b1 * state.get("exp_avg", 0.0) + (1 - b1) * gradient
    v = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * gradient**2
    m, v = m / (1 - b1**t), v / (1 - b2**t)
    return weight - lr * decay * weight - lr * m / (v.sqrt() + group["eps"])


def noam(step: int) -> float:
    """Warm-up and inverse root on a base of 1.0."""
    return 0.05 * min((step + 1) ** -0.5, (step + 1) * 5**-1.5)


class ByHand(Watching):
    """A warm-up by hand, the base of which no step uses."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Five steps of warm-up."""
        self.note("on_before_optimizer_step")
        for group, base in zip(optimizer.param_groups, (BASE, BASE / 2), strict=True):
            group["lr"] = base * min(1.0, (self.global_step + 1) / 5)


AHEAD: dict[str, Any] = {
    "warm-up": lambda o: schedules.LinearLR(o, 0.1, total_iters=6),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: schedules.OneCycleLR(o, [0.05, 0.03], total_steps=STEPS),
    "Noam": lambda o: schedules.LambdaLR(o, noam),
    "step": lambda o: schedules.StepLR(o, 4),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.04, 3, cycle_momentum=False),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5),
    "polynomial": lambda o: schedules.PolynomialLR(o, STEPS),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.CosineAnnealingLR(o, 8)], [4]
    ),
}
SO_FAR: dict[str, Any] = {
    "constant": None,
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "by hand": None,
}


@pytest.mark.parametrize("name", [*AHEAD, *SO_FAR])
def test_steps_by_hand_under_twelve_schedules(name: str, capsys: Any, caplog: Any) -> None:
    """Each step of AdamW to float64 roundoff, with η_max from the rates that the run had; groups as the user made them.

    Torch and the equations above round about ten operations differently, some with numbers larger than the result.
    """
    kind = ByHand if name == "by hand" else Watching
    net = kind((AHEAD | SO_FAR)[name], lr=1.0 if name == "Noam" else BASE)
    with caplog.at_level("INFO"):
        fit(net, Beside(), CorrectedDecay, Beside())
    rates = {n: [step["settings"][n]["lr"] for step in net.done] for n in net.done[0]["settings"]}
    assert len(net.done) == STEPS
    shares = set()
    for number, step in enumerate(net.done):
        for n, (after, gradient) in step["after"].items():
            highest = max(rates[n] if name in AHEAD else rates[n][: number + 1])
            share = rates[n][number] / highest if n in TARGETS else 1.0
            expected = adamw(step["before"][n], gradient, step["settings"][n], DECAY * share)
            assert after == pytest.approx(expected, rel=1e-12, abs=1e-14), (number, n)
            shares.add(round(share, 6))
    assert (len(shares) > 1) == (name not in ("constant", "by hand"))
    assert {str(groups) for _, groups in net.seen} == {str(net.seen[0][1])}
    assert {"training_step", "pre-hook", "post-hook", "on_after_backward", "callback"} <= {hook for hook, _ in net.seen}
    said = "by the schedule" if name in AHEAD else "the highest learning rate so far"
    assert sum("CorrectedDecay: the decay of" in line and said in line for line in caplog.messages) == 1


class HandWritten(AdamW):
    """AdamW whose user has written the corrected decay into it, as a multiplication before its own step."""

    targets: Any = ()
    peaks: Any = None

    def step(self, closure: Any = None) -> Any:
        """The closure, decay, and a step without decay; the highest rate is that so far, or what is known."""
        with torch.enable_grad():
            loss = closure()
        self.highest = getattr(self, "highest", list(self.peaks or ()))
        self.highest += [0.0] * (len(self.param_groups) - len(self.highest))
        decays = [group["weight_decay"] for group in self.param_groups]
        for i, group in enumerate(self.param_groups):
            self.highest[i] = max(self.highest[i], group["lr"])
            share = group["lr"] / self.highest[i] if self.highest[i] else 1.0
            for p in group["params"]:
                if p.grad is not None:
                    decay = decays[i] * share if any(p is t for t in self.targets) else decays[i]
                    with torch.no_grad():
                        p.mul_(1 - group["lr"] * decay)
            group["weight_decay"] = 0.0
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return loss


class ByIndex(Watching):
    """Learning rates by the number of the group, in the training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Two rates."""
        for group, lr in zip(self.trainer.optimizers[0].param_groups, (0.9, 0.8), strict=False):
            group["lr"] = BASE * lr**batch_idx
        return super().training_step(batch, batch_idx)


class Added(Watching):
    """The head is handed to the optimizer at the fourth step."""

    def configure_optimizers(self) -> Any:
        """All but the head, in one group."""
        params = [p for n, p in self.named_parameters() if not n.startswith("head")]
        return self.make(params, lr=BASE, weight_decay=DECAY)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A group more, and a falling rate."""
        (optimizer,) = self.trainer.optimizers
        if batch_idx == 3:
            optimizer.add_param_group({"params": list(self.head.parameters()), "lr": 0.1})
        optimizer.param_groups[0]["lr"] = BASE * 0.9**batch_idx
        return super().training_step(batch, batch_idx)


class DecaySchedule(Watching):
    """Decay that the user lets rise, beside a schedule of the rate."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """As in self-supervised recipes."""
        for group in optimizer.param_groups:
            group["weight_decay"] = DECAY * (1 + self.global_step)


@pytest.mark.parametrize("kind", [ByIndex, Added, DecaySchedule])
def test_with_the_users_code_as_written_by_hand(kind: type[Watching], tmp_path: Path) -> None:
    """Weights, states and groups in all checkpoints agree, bit for bit, with an optimizer that corrects by itself."""
    schedule = AHEAD["sequence"] if kind is DecaySchedule else None
    saved, rates = [], [BASE, BASE / 2] if schedule else None
    for by_hand in (False, True):
        folder = tmp_path / str(by_hand)
        net = kind(schedule)
        if by_hand:
            net.make = type("Corrected", (HandWritten,), {"targets": [net.get_parameter(n) for n in TARGETS]})
            net.make.peaks = rates
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        callbacks = [saver] if by_hand else [CorrectedDecay, saver]
        fit(net, *callbacks, enable_checkpointing=True)
        saved.append([torch.load(path, weights_only=True) for path in sorted(folder.iterdir())])
        if not by_hand and schedule:
            rates = [max(d["settings"][n]["lr"] for d in net.done) for n in TARGETS]
    assert len(saved[0]) == len(saved[1]) == 4
    for ours, theirs in zip(*saved, strict=True):
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    head = [checkpoint["state_dict"]["head.weight"] for checkpoint in saved[0]]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(head[1:]))


class Falling(Watching):
    """A rate that falls by hand."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """By the number of the step."""
        for group in optimizer.param_groups:
            group["lr"] = BASE * 0.8**self.global_step


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # Lightning on one that the first run has filled
@pytest.mark.parametrize("kind", [Falling, Watching])
def test_a_resumed_run_knows_the_highest_rate(kind: type[Watching], tmp_path: Path) -> None:
    """Which it cannot see again: the peak is in the first epoch. Bit for bit as a run that was not interrupted."""
    ends = []
    for path in (None, tmp_path / "epoch=0.ckpt"):
        net = kind(AHEAD["sequence"] if kind is Watching else None).double()  # Lightning loads before it converts
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [CorrectedDecay(invariance=known()), saver]
        run = trainer(*callbacks, precision="64-true", max_epochs=2, enable_checkpointing=True)
        run.fit(net, data(2), ckpt_path=path)
        assert len(net.done) == (STEPS if path is None else STEPS // 2)
        ends.append(net.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
