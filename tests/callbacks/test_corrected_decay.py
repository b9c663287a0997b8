"""Decay in proportion to the learning rate, on scale-invariant weights only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_normreg import CorrectedDecay, EffectiveLRMonitor, NormProjection
from lightning_normreg.functional import equilibrium_norm
from tests.callbacks.test_equilibrium import CLOSE, ENTRIES, OPTIMIZERS, Noise, noise
from tests.harness import Net, images, loader, sgd, trainer

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


class Llama(LightningModule):
    """As its sources train: under a falling rate, decay on everything. No weight is scale-invariant by itself."""

    def __init__(self, frozen: str = "") -> None:
        super().__init__()
        hf = pytest.importorskip("transformers", reason="transformers is not installed")
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=31, tie_word_embeddings=False, **sizes))
        for name, p in self.model.named_parameters():
            p.requires_grad_(not (frozen and frozen in name))
        self.norms = [n for n, _ in self.named_parameters() if "norm" in n]
        self.steps: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the model."""
        return self.model(input_ids=batch[0], labels=batch[0]).loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        """Plain SGD on what is trained."""
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Keep what a step by hand needs."""
        before = {n: p.detach().clone() for n, p in self.named_parameters() if p.requires_grad}
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        after = {n: (p.detach().clone(), p.grad) for n, p in self.named_parameters() if p.requires_grad}
        self.steps.append((optimizer.param_groups[0]["lr"], before, after))


WORDS = DataLoader(torch.utils.data.TensorDataset(torch.arange(4 * 2 * 7).reshape(8, 7) % 31), 2)
LINE = r"exclude=\[…the head…\], on_not_invariant='allow'\)\."


def test_a_language_model(caplog: Any) -> None:
    """Refused by default, with the line that corrects it all the same: its steps by hand, but for head and gains."""
    with pytest.raises(ValueError, match=rf"as in most transformers\. .* To let the decay .* CorrectedDecay\({LINE}"):
        trainer(CorrectedDecay()).fit(Llama(), WORDS)
    net, callback = Llama(), CorrectedDecay(exclude=["*lm_head*"], on_not_invariant="allow")
    with caplog.at_level("INFO"):
        trainer(callback, precision="64-true").fit(net, WORDS)
    assert [lr for lr, _, _ in net.steps] == pytest.approx([0.1, 0.0775, 0.055, 0.0325])
    for lr, before, after in net.steps:
        for name, (weight, gradient) in after.items():
            share = 1.0 if name in net.norms or "lm_head" in name else lr / 0.1
            expected = before[name] - lr * (gradient + DECAY * share * before[name])
            assert weight == pytest.approx(expected, rel=1e-12, abs=1e-15), name
    (said,) = [line for line in caplog.messages if line.startswith("CorrectedDecay: the decay")]
    assert said.startswith("CorrectedDecay: the decay of 15 weights is proportional to lr/lr_max, with lr_max = 0.1 by")
    assert "Not scale-invariant by themselves: model.model.embed_tokens.weight, " in said


def test_what_is_frozen_is_left_out(caplog: Any) -> None:
    """The same line serves a model that is half frozen; what is in no optimizer is not counted."""
    with caplog.at_level("INFO"):
        trainer(CorrectedDecay(exclude=["*lm_head*"], on_not_invariant="allow")).fit(Llama("layers.0"), WORDS)
    assert any("CorrectedDecay: the decay of 8 weights is" in line for line in caplog.messages)


def test_skip_leaves_out_what_is_named(caplog: Any) -> None:
    """And says so."""
    with caplog.at_level("INFO"):
        trainer(CorrectedDecay(include=["*.weight"], exclude=["norm*"], on_not_invariant="skip")).fit(
            Net(sgd(weight_decay=DECAY)), loader()
        )
    assert "CorrectedDecay leaves out what is not scale-invariant: head.weight." in caplog.messages
    assert any("the decay of 2 weights is" in line for line in caplog.messages)


def test_errors() -> None:
    """A wrong peak, a weight that is not scale-invariant, nothing that is, an unknown optimizer."""

    class Unknown(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    with pytest.raises(ValueError, match=r"`peak_lr` must be 'auto' or a positive number, got -1"):
        CorrectedDecay(-1)
    with pytest.raises(ValueError, match=r"`on_not_invariant` must be 'raise', 'skip' or 'allow', got 'no'"):
        CorrectedDecay(on_not_invariant="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`include` must name scale-invariant weights, but 'head\.weight'"):
        trainer(CorrectedDecay(include=["*.weight"], exclude=["norm*"])).fit(Net(sgd()), loader())
    with pytest.raises(ValueError, match="CorrectedDecay must know how the optimizer decays, but Unknown"):
        trainer(CorrectedDecay()).fit(Net(Unknown), loader())


class Rising(OneGroup):
    """A learning rate that rises with each step of its scheduler, so its highest tells how often that is stepped."""

    def __init__(self, optimizer: Any, **config: Any) -> None:
        super().__init__(optimizer)
        self.config, self.rates = config, []

    def configure_optimizers(self) -> Any:
        """One group."""
        optimizer = self.make([{"params": list(self.parameters()), "lr": 0.01}])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 + t)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler} | self.config}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Keep the rate."""
        self.rates.append(optimizer.param_groups[0]["lr"])


RUNS: list[dict[str, Any]] = [
    {},
    {"accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 3, "max_epochs": 3},
    {"max_epochs": -1, "max_steps": 10},
]


@pytest.mark.parametrize("options", RUNS)
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_the_schedule_is_run_ahead_to_the_end_of_the_run(
    options: Any, interval: str, frequency: int, caplog: Any
) -> None:
    """Seven batches an epoch: the rate that is said is the highest of the run, and nothing was stepped for it."""
    net = Rising(sgd(weight_decay=1e-3), interval=interval, frequency=frequency)
    with caplog.at_level("INFO"):
        trainer(CorrectedDecay(), **({"max_epochs": 2} | options)).fit(net, loader(n=28))
    said = [line for line in caplog.messages if line.startswith("CorrectedDecay:")]
    assert said == [
        "CorrectedDecay: the decay of 2 weights is proportional to lr/lr_max, with lr_max = "
        f"{max(net.rates):.3g} by the schedule."
    ]


class Stream(torch.utils.data.IterableDataset[Any]):
    """The same images without a length."""

    def __iter__(self) -> Any:
        """In order."""
        return iter(images(48))


class ByYourself(Rising):
    """Manual optimization."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """A step of the optimizer and of the scheduler."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]


class Stop(Callback):
    """Ends a run without an end."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """After the first epoch."""
        trainer.should_stop = True


@pytest.mark.parametrize(
    "kind, options, config, why",
    [
        (Rising, {"max_epochs": -1, "limit_train_batches": 4}, {"interval": "step"}, "the run has no end"),
        (Rising, {"max_epochs": 2, "max_steps": 5}, {"stream": True}, "an epoch has no known length"),
        (ByYourself, {}, {}, "schedulers are stepped by your own code"),
        (Net, {}, None, "the Trainer steps no scheduler"),
    ],
)
def test_where_the_highest_rate_so_far_counts(kind: Any, options: Any, config: Any, why: str, caplog: Any) -> None:
    """The reason is said, once."""
    data = DataLoader(Stream(), 4) if (config or {}).pop("stream", False) else loader()
    net = Net(sgd(weight_decay=1e-3), False) if config is None else kind(sgd(weight_decay=1e-3), **config)
    with caplog.at_level("INFO"):
        trainer(CorrectedDecay(), *([Stop()] if options.get("max_epochs") == -1 else []), **options).fit(net, data)
    said = [line for line in caplog.messages if line.startswith("CorrectedDecay:")]
    assert len(said) == 1
    assert said[0].endswith(f"with lr_max the highest learning rate so far ({why}).")


def test_a_stream_with_a_number_of_steps(caplog: Any) -> None:
    """As language models are trained: the schedule by steps is known to its end."""
    net = Rising(sgd(weight_decay=1e-3), interval="step")
    with caplog.at_level("INFO"):
        trainer(CorrectedDecay(), max_epochs=-1, max_steps=20).fit(net, DataLoader(Stream(), 4))
    assert len(net.rates) == 20
    assert any(line.endswith("with lr_max = 0.2 by the schedule.") for line in caplog.messages)


def test_beside_a_projection() -> None:
    """Both act on the same weights without getting in each other's way."""
    net = OneGroup(sgd(weight_decay=DECAY))
    trainer(NormProjection(), CorrectedDecay(), EffectiveLRMonitor()).fit(net, loader())
    assert net.conv1.weight.detach().flatten(1).norm(dim=1) == pytest.approx(torch.ones(6), rel=1e-6)
