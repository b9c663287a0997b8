from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import DecayGroupsMixin, decay_groups

OPTIMIZERS = {n: c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, Optimizer)}
# LBFGS takes no groups, Muon only matrices, SparseAdam only sparse gradients; each has a test of its own.
FOR_ANY_MODEL = sorted(set(OPTIMIZERS) - {"Optimizer", "LBFGS", "Muon", "SparseAdam"})


def model(seed: int = 0) -> nn.Sequential:
    """A network with a parameter of each role, in float64."""
    torch.manual_seed(seed)
    layers = [nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 1)]
    net = nn.Sequential(*layers, nn.ParameterList([torch.ones(2, 2)]))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net.double()


def random_gradients(module: nn.Module, seed: int) -> None:
    """Give every parameter a gradient without zeros."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = 0.5 + torch.rand(p.shape, generator=generator, dtype=p.dtype)


def values(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that are finite and others than before."""
    return {n for n, p in module.named_parameters() if p.isfinite().all() and not torch.equal(p, before[n])}


@pytest.mark.parametrize("name", FOR_ANY_MODEL)
def test_every_optimizer(name: str) -> None:
    """Every optimizer of torch that takes groups takes these, keeps them as they are and moves every parameter."""
    net = model()
    given = decay_groups(net, 0.1)
    optimizer = OPTIMIZERS[name]([dict(group) for group in given], lr=0.1)
    keys = ("name", "weight_decay", "param_names")
    assert [[g[k] for k in keys] for g in optimizer.param_groups] == [[g[k] for k in keys] for g in given]
    before = values(net)
    random_gradients(net, seed=1)
    optimizer.step()
    assert moved(net, before) == set(before)


@pytest.mark.skipif("Muon" not in OPTIMIZERS, reason="torch has Muon since 2.9")
def test_muon() -> None:
    """Muon takes the groups that hold matrices, and refuses the others."""
    net = model()
    groups = decay_groups(net, 0.1)
    weights = [group for group in groups if group["name"] in ("weight", "embedding", "other")]
    optimizer = OPTIMIZERS["Muon"](weights, lr=0.1)
    before = values(net)
    random_gradients(net, seed=1)
    optimizer.step()
    assert moved(net, before) == {name for name, p in before.items() if p.ndim == 2}
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        OPTIMIZERS["Muon"](decay_groups(net, 0.1), lr=0.1)


def test_sparse_adam() -> None:
    """SparseAdam takes the group of an embedding with sparse gradients; it has no decay of its own to apply."""
    net = nn.Embedding(5, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(decay_groups(net, 0.1), lr=0.1)
    before = values(net)["weight"]
    net(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    assert (net.weight != before).any(dim=1).tolist() == [False, True, False, True, False]


def test_lbfgs() -> None:
    """LBFGS takes no groups at all, and says so."""
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        torch.optim.LBFGS(decay_groups(model(), 0.1))


def test_each_parameter_shrinks_by_its_own_decay() -> None:
    """With lr=1 and no gradient one step of plain SGD leaves exactly 1 - decay of each parameter."""
    # Powers of two, so that decay * w and 1 - decay are exact: w - decay * w and (1 - decay) * w round the same
    # real number, and must be equal bit for bit.
    net = model()
    roles = {"gamma": 2**-3, "beta": 2**-4, "bias": 0.0, "embedding": 2**-6, "other": 2**-7}
    overrides = {"4.weight": 2**-8, "5.0": None}
    optimizer = torch.optim.SGD(decay_groups(net, 2**-2, **roles, overrides=overrides), lr=1.0)
    decay = {
        "0.weight": roles["embedding"],
        "1.weight": 2**-2,
        "1.bias": 0.0,
        "2.weight": roles["gamma"],
        "2.bias": roles["beta"],
        "3.weight": roles["other"],
        "4.weight": 2**-8,
        "4.bias": 0.0,
        "5.0": 2**-2,
    }
    before = values(net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = values(net)
    assert [name for name in before if not torch.equal(after[name], before[name] * (1 - decay[name]))] == []


def test_thawed_layer_comes_as_another_group() -> None:
    """A layer that thaws later is added as groups of its own, which torch wants with names, as ours are."""
    net = model()
    net[4].requires_grad_(False)
    optimizer = torch.optim.SGD(decay_groups(net, 0.1), lr=0.1)
    net[4].requires_grad_(True)
    for group in decay_groups(net[4], 0.1):
        optimizer.add_param_group({**group, "name": f"head_{group['name']}"})
    assert [group["name"] for group in optimizer.param_groups][-2:] == ["head_weight", "head_bias"]
    before = values(net)
    random_gradients(net, seed=1)
    optimizer.step()
    assert moved(net, before) == set(before)
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_state_dict_round_trip(tmp_path: Path) -> None:
    """A run that is saved, loaded into new groups and continued ends where one without interruption ends."""

    def train(net: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            random_gradients(net, seed=step)
            optimizer.step()

    net = model()
    optimizer = torch.optim.AdamW(decay_groups(net, 0.1), lr=0.1)
    train(net, optimizer, range(3))
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(net, optimizer, range(3, 6))

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = model(seed=1)
    resumed.load_state_dict(saved["net"])
    again = torch.optim.AdamW(decay_groups(resumed, 0.1), lr=0.1)
    again.load_state_dict(saved["optimizer"])
    keys = ("name", "weight_decay", "param_names")
    assert [[g[k] for k in keys] for g in again.param_groups] == [[g[k] for k in keys] for g in optimizer.param_groups]
    train(resumed, again, range(3, 6))
    assert [name for name, p in values(net).items() if not torch.equal(p, values(resumed)[name])] == []


class Net(DecayGroupsMixin, LightningModule):
    """A network that learns by AdamW with decay groups."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
        self.pos = nn.Parameter(torch.zeros(2, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean square of the output."""
        return self.body(batch[0]).square().mean() + self.pos.square().mean()

    def configure_optimizers(self) -> Optimizer:
        """Groups with two decays for weights."""
        groups = self.decay_groups(0.05, beta=0.01, overrides={"body.2.weight": 0.2})
        return torch.optim.AdamW(groups, lr=1e-3)


def test_learning_rate_monitor(tmp_path: Path) -> None:
    """LearningRateMonitor has a curve for the rate and one for the decay of each group, under the group's name."""
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    run = Trainer(
        max_steps=2,
        log_every_n_steps=1,
        enable_checkpointing=False,
        logger=CSVLogger(tmp_path, name="run", version="0"),
        callbacks=[LearningRateMonitor(logging_interval="step", log_weight_decay=True)],
        **options,
    )
    run.fit(Net(), DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2))
    decays = {"weight": 0.05, "weight_wd_0.2": 0.2, "gamma": 0.0, "beta": 0.01, "bias": 0.0, "other": 0.05}
    rates = {f"lr-AdamW/{name}": 1e-3 for name in decays}
    shrinks = {f"lr-AdamW/{name}-weight_decay": decay for name, decay in decays.items()}
    with (tmp_path / "run" / "0" / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if k.startswith("lr-")} for row in csv.DictReader(file)]
    assert rows == [rates | shrinks] * 2
