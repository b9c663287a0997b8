"""Situations that were met in the field, each with what is true of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import EffectiveLRMonitor, NormProjection, NormSummary, RotationControl, find_scale_invariance
from tests.harness import trainer


def batches(n: int = 64, size: int = 16) -> DataLoader[Any]:
    """Vectors with labels."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), size)


class Model(LightningModule):
    """Two layers behind BatchNorm, and a head: the first two weights are scale-invariant, neuron by neuron."""

    def __init__(self, eps: float = 1e-5, lr: float = 0.05, decay: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8, eps), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Linear(8, 3),
        )  # fmt: skip
        self.lr, self.decay = lr, decay

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), self.lr, weight_decay=self.decay)


class WarmedUp(Model):
    """A penalty that is off for thirty steps, as a KL term often is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The penalty acts on the first weight."""
        on = float(self.trainer.global_step >= 30)
        return super().training_step(batch, batch_idx) + on * self.net[0].weight.square().sum()


def test_a_term_that_comes_later_is_noticed_within_a_few_steps() -> None:
    """At the looks from step 20, 40, 80, … on; the weight is let go and its curve goes by another name."""
    net, monitor = WarmedUp(), EffectiveLRMonitor()
    lost = pytest.warns(UserWarning, match=r"No longer scale-invariant: 'net\.0\.weight'")
    with lost, pytest.warns(UserWarning, match=r"holds net\.0\.weight no more"):
        trainer(monitor, NormProjection(), max_epochs=15).fit(net, batches())
    history = monitor.history().set_index("step")
    assert history["weights/effective_lr/net.0.weight"].dropna().index.max() == 43  # looks are four steps long
    assert history["weights/effective_lr_not_invariant/net.0.weight"].dropna().index.min() == 44
    norms = {i: net.net[i].weight.detach().norm(dim=1) for i in (0, 3)}
    assert (norms[0] - 1).abs().max() > 1e-2
    assert norms[3] == pytest.approx(torch.ones(8), rel=1e-6)


def test_an_eps_that_rules_gives_one_answer_everywhere() -> None:
    """`BatchNorm1d(n, 0.8)`, whose 0.8 lands in eps: not invariant for table, percentage, curves and projection."""
    net, monitor, summary = Model(eps=0.8, decay=1e-2), EffectiveLRMonitor(), NormSummary()
    with pytest.warns(UserWarning, match=r"NormProjection leaves net\.0\.weight alone. The eps of a normalization"):
        trainer(monitor, summary, NormProjection(), max_epochs=1).fit(net, batches())
    tags = set(monitor.history())
    assert {"weights/effective_lr_not_invariant/net.0.weight", "weights/effective_lr/net.3.weight"} <= tags
    assert "weights/effective_lr/net.0.weight" not in tags
    units = {row["parameter"]: (row["units"], row["invariant"]) for row in summary.rows()}
    assert units["net.0.weight"] == ("each neuron, but for eps", False)
    assert units["net.3.weight"] == ("each neuron", True)
    # 8×8 entries of all that is decayed and reaches the loss: three weights, two gains, two shifts, and a bias; the
    # biases in front of BatchNorm do not reach it.
    share = 64 / (6 * 8 + 8 * 8 + 3 * 8 + 4 * 8 + 3)
    assert summary.sentences()[0].startswith(f"{share:.0%} of what you decay is scale-invariant")
    assert "net.0.bias" not in " ".join(summary.sentences())


def test_a_weight_that_grows_out_of_its_eps_is_taken_up() -> None:
    """Too small at first; without decay plain SGD lengthens it, and at the 32nd batch it is asked again."""
    net, monitor = Model(lr=1.0), EffectiveLRMonitor(on_unhealthy="ignore")
    net.net[0].weight.data.mul_(1e-3)
    before = find_scale_invariance(net, next(iter(batches())), forward=lambda m, b: m.net(b[0]).exp().mean())
    assert before["net.0.weight"].is_ruled_by_eps
    trainer(monitor, max_epochs=12).fit(net, batches())
    history = monitor.history().set_index("step")
    assert history["weights/effective_lr_not_invariant/net.0.weight"].dropna().index.min() == 0
    assert history["weights/effective_lr/net.0.weight"].dropna().index.min() == 31


class Bare(LightningModule):
    """Its only matrices are bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Parameter(torch.randn(6, 8))
        self.V = nn.Parameter(torch.randn(8, 3))
        self.scale = nn.Parameter(torch.ones(1, 1, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The columns of W are normalized over the batch."""
        x = nn.functional.batch_norm(batch[0] @ self.W, None, None, training=True)
        return nn.functional.cross_entropy(torch.relu(x) @ self.V * self.scale[0, 0], batch[1])

    def configure_optimizers(self) -> Any:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), 0.05)


def test_bare_matrices_are_watched_and_held_like_weights() -> None:
    """In the units that the loss has: columns here, because W is used without transposing it."""
    net, monitor = Bare(), EffectiveLRMonitor()
    trainer(monitor, NormProjection(), max_epochs=1).fit(net, batches())
    assert {"weights/effective_lr/W", "weights/effective_lr_not_invariant/V"} <= set(monitor.history())
    assert not any(tag.endswith("/scale") for tag in monitor.history())
    assert net.W.detach().norm(dim=0) == pytest.approx(torch.ones(8), rel=1e-6)


def test_parameters_that_share_memory_are_tied() -> None:
    """Two parameters on one storage: watched, counted and held once, under the first name."""
    net, monitor, summary = Model(), EffectiveLRMonitor(), NormSummary()
    net.net[3].weight = nn.Parameter(torch.randn(8, 8))
    twin = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    twin[0].weight = nn.Parameter(net.net[3].weight.data)  # another parameter, the same memory
    net.net.insert(6, twin)
    trainer(monitor, summary, NormProjection(), max_epochs=1).fit(net, batches())
    assert "weights/effective_lr/net.3.weight" in monitor.history()
    assert not any("net.6.0" in tag for tag in monitor.history())
    assert "net.6.0.weight" not in {row["parameter"] for row in summary.rows()}
    verdict = find_scale_invariance(net, next(iter(batches())), forward=lambda m, b: m.net(b[0]).exp().mean())
    assert verdict["net.3.weight"].kind == "neuron"  # rows of both uses are normalized
    assert net.net[3].weight.detach().norm(dim=1) == pytest.approx(torch.ones(8), rel=1e-6)


def test_a_stream_has_no_epochs_and_names_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """An IterableDataset has no length, so no number of epochs is said; at 80 columns names are folded."""

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            yield from batches()

    summary = NormSummary()
    trainer(summary, max_steps=2, max_epochs=-1).fit(Model(decay=1e-2), DataLoader(Stream(), batch_size=None))
    (said,) = [sentence for sentence in summary.sentences() if "1/(lr·decay)" in sentence]
    assert (
        said
        == "At lr 0.05 and decay 0.01 it acts over 1/(lr·decay) = 2e+03 steps, 1e+03 of the run at this learning rate."
    )
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert len(max(shown.splitlines(), key=len)) >= 80


class Warming(Model):
    """Its warm-up starts at 0."""

    def configure_optimizers(self) -> Any:
        """The first update does nothing."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_a_warm_up_from_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The first update that does something is the first that is logged; angles are checked before the first step."""
    monitor = EffectiveLRMonitor()
    with caplog.at_level("INFO"):
        trainer(monitor, RotationControl("equilibrium"), log_every_n_steps=50).fit(Warming(decay=0.1), batches())
    assert "turns 2 weights by an angle per step, that of the equilibrium of decay: now 0. Gradients" in caplog.text
    (row,) = monitor.history().to_dict("records")
    assert row["step"] == 1
    assert row["weights/rotation/net.0.weight"] > 0
    with pytest.raises(ValueError, match=r"`angle='equilibrium'` is that of weight decay at 'net\.0\.weight'"):
        trainer(RotationControl("equilibrium")).fit(Warming(), batches())


class Flat(nn.Module):
    """Keeps its matrix as a vector, as equivariant layers do."""

    def __init__(self, entries: int, outputs: int) -> None:
        super().__init__()
        self.shape = (outputs, entries)
        self.weight = nn.Parameter(torch.randn(outputs * entries) / entries**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """As a linear layer."""
        return x @ self.weight.view(self.shape).T


class Unfolded(Model):
    """All weights are flat; the first two are scale-invariant, each as a whole at least."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for place, (entries, outputs) in {0: (6, 8), 3: (8, 8), 6: (8, 3)}.items():
            self.net[place] = Flat(entries, outputs)


def test_flat_weights_are_watched_and_held_by_their_units() -> None:
    """What the layer multiplies by decides, not the number of dimensions."""
    monitor, projection = EffectiveLRMonitor(), NormProjection()
    net = Unfolded()
    trainer(monitor, projection, max_epochs=2).fit(net, batches())
    tags = set(monitor.history().columns)
    assert {f"weights/effective_lr/net.{place}.weight" for place in (0, 3)} <= tags
    assert "weights/effective_lr/net.6.weight" not in tags
    assert list(projection.held()) == ["net.0.weight", "net.3.weight"]
    for place in (0, 3):
        assert float(net.get_parameter(f"net.{place}.weight").detach().double().norm()) == pytest.approx(1, abs=1e-6)
