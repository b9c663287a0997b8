"""What a training_step does to the Trainer, to schedulers and loggers, and what other threads see of the probe."""

from __future__ import annotations

import threading
import warnings
from collections import UserDict
from collections.abc import MutableMapping
from dataclasses import dataclass

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import find_scale_invariance
from lightning_normreg.callbacks._probing import few_samples
from tests.symmetries.test_privacy import ProbeAtFirstBatch


def body():
    """Linear, BatchNorm, head."""
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3))


class Meddler(LightningModule):
    """Steps its scheduler, and sets, saves, logs and fetches whatever it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.net = body()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        """Cross entropy, and all that."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        assert isinstance(self.trainer, Trainer)
        assert isinstance(self.optimizers(), torch.optim.Optimizer) or self.optimizers().param_groups
        self.lr_schedulers().step()
        self.optimizers().param_groups[0]["momentum"] *= 0.99
        self.trainer.seen = getattr(self.trainer, "seen", 0) + 1
        self.trainer.fit_loop.seen = getattr(self.trainer.fit_loop, "seen", 0) + 1
        self.trainer.numbers.append(next(self.trainer.counter))
        self.logger.experiment.log_metrics({"own": 1.0}, step=len(self.trainer.numbers))
        self.loggers[0].log_metrics({"more": 1.0}, step=len(self.trainer.numbers))
        self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/own-{len(self.trainer.numbers)}.ckpt")
        self.print("hello")
        self.save_hyperparameters({"lr": float(self.trainer.global_step)})
        return loss

    def configure_optimizers(self):
        """With a scheduler that the step itself steps."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "frequency": 10**9}]


def fit(path, *callbacks):
    """Four batches; everything that the step might have changed."""
    torch.manual_seed(0)
    module = Meddler()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=CSVLogger(path), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=path, log_every_n_steps=1,
    )  # fmt: skip
    trainer.numbers, trainer.counter = [], iter(range(100))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 6, generator=generator), torch.arange(32) % 3)
    trainer.fit(module, DataLoader(data, batch_size=8))
    group = trainer.optimizers[0].param_groups[0]
    files = sorted(p.name for p in path.rglob("*") if p.is_file())
    numbers = (
        group["lr"],
        group["momentum"],
        trainer.seen,
        trainer.fit_loop.seen,
        trainer.numbers,
        next(trainer.counter),
    )
    return module, numbers, files, (path / "lightning_logs/version_0/metrics.csv").read_text()


def test_whatever_a_step_does_is_done_once(tmp_path, capsys):
    """Learning rate, momentum, what was set on the Trainer, its iterator, files and logs: all as without the probe."""
    probe = ProbeAtFirstBatch()
    plain, *expected = fit(tmp_path / "plain")
    said = capsys.readouterr().out.count("hello")
    probed, *found = fit(tmp_path / "probed", probe)
    assert capsys.readouterr().out.count("hello") == said
    assert probe.verdicts["net.0.weight"].kind == "neuron"
    assert found == expected
    assert expected[0][0] == pytest.approx(0.1 * 0.9**4)
    assert dict(plain.hparams) == dict(probed.hparams)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), probed.state_dict().values(), strict=True)
    )


def test_other_threads_see_nothing_of_a_probe():
    """A thread that draws from torch's generator meanwhile: float32 throughout, and the stream of a thread alone."""
    started, stop = threading.Event(), threading.Event()
    drawn: list[Tensor] = []
    types = set()

    def draw():
        while not stop.is_set() or len(drawn) < 50:
            drawn.append(torch.randn(1000))
            types.update(
                {torch.get_default_dtype(), torch.zeros(1).dtype, drawn[-1].dtype, (torch.ones(1).int() / 2).dtype}
            )
            started.set()

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = body()

        def forward(self, x):
            torch.manual_seed(3)  # of this thread only
            noise = torch.rand_like(x) + torch.randn(x.shape) + torch.randperm(6) + torch.randint(3, x.shape)
            return checkpoint(self.net, x + noise, use_reentrant=False)

    net, x = Drawing(), torch.randn(8, 6)
    torch.manual_seed(7)
    thread = threading.Thread(target=draw)
    thread.start()
    started.wait()
    try:
        verdicts = find_scale_invariance(net, x, forward=exp_loss)
    finally:
        stop.set()
        thread.join()
    assert verdicts["net.0.weight"].kind == "neuron"
    assert types == {torch.float32}
    torch.manual_seed(7)
    assert all(torch.equal(torch.randn(1000), numbers) for numbers in drawn)


def exp_loss(module, x):
    """Not symmetric in the outputs."""
    return module(x).exp().mean()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3), lambda: torch.ones(2, requires_grad=True), lambda: torch.tensor([0.5, 1]),
        lambda: torch.as_tensor(0.1), lambda: torch.full((2,), 0.5), lambda: torch.linspace(0, 1, 3),
        lambda: torch.eye(2), lambda: torch.arange(3.0),
        lambda: torch.arange(3) / 2, lambda: torch.arange(3) * 0.5, lambda: torch.rand(2),
        lambda: torch.randn(2), lambda: torch.normal(0.0, 1.0, (2,)), lambda: torch.arange(3).sqrt(),
        lambda: torch.where(torch.tensor(True), 0.5, 1.0), lambda: nn.Linear(2, 2).weight, lambda: torch.empty(2),
        lambda: torch.arange(3).float(), lambda: torch.zeros(2, dtype=torch.float32), lambda: torch.Tensor([1.0, 2.0]),
    ],
)  # fmt: skip
def test_what_a_step_makes_has_the_type_of_the_probe(make):
    """Factories without a type, and what integers are promoted to."""
    types = []

    def loss(module, x):
        made = make()
        types.append(made.dtype)
        return module(x).exp().mean()

    find_scale_invariance(body(), torch.randn(8, 6), forward=loss, dtype="float64")
    assert set(types) == {torch.float64}
    assert make().dtype == torch.float32


@pytest.mark.parametrize(
    "draw",
    [
        torch.rand_like, torch.randn_like, lambda x: torch.randint_like(x, 5),
        lambda x: torch.randint_like(x, 2, 5), lambda x: torch.rand(3), lambda x: torch.randn(3),
        lambda x: torch.randperm(9),
        lambda x: torch.randint(9, (3,)), lambda x: torch.randint(2, 9, (3,)), lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: torch.normal(x, 1.0), lambda x: torch.normal(0.0, 1.0, (2,)), lambda x: torch.multinomial(x.exp(), 2),
        F.dropout, F.gumbel_softmax, lambda x: torch.native_dropout(x, 0.5, True)[0],
        lambda x: torch.empty(3).uniform_(), lambda x: F.rrelu(x, training=True),
        lambda x: F.alpha_dropout(x, training=True),
        lambda x: torch.distributions.Normal(0.0, 1.0).sample((2,)), lambda x: torch.poisson(x.exp()),
        lambda x: torch.distributions.Gamma(2.0, 1.0).sample((2,)),
        lambda x: torch.distributions.Dirichlet(torch.ones(3)).sample((2,)),
    ],
)  # fmt: skip
def test_random_numbers_of_a_step_are_drawn_apart(draw):
    """Torch's generator does not move; the same call draws the same numbers, another one other numbers."""
    drawn: list[list[Tensor]] = []

    def loss(module, x):
        drawn.append([draw(x.detach()), draw(x.detach())])
        return module(x).exp().mean()

    net = body()
    state = torch.get_rng_state()
    for _ in range(2):
        find_scale_invariance(net, torch.randn(8, 6, generator=torch.Generator()), forward=loss, dtype="float32")
    assert torch.equal(state, torch.get_rng_state())
    half = len(drawn) // 2
    for one, same in zip(drawn[:half], drawn[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
        assert not torch.equal(*one)


class Tensors(MutableMapping):
    """As a TensorDict: a mapping with a batch size, which needs it to be built."""

    def __init__(self, content, batch_size) -> None:
        self.content, self.batch_size = content, batch_size

    def __getitem__(self, key):
        return self.content[key]

    def __setitem__(self, key, value):
        assert len(value) == self.batch_size
        self.content[key] = value

    def __delitem__(self, key):
        del self.content[key]

    def __iter__(self):
        return iter(self.content)

    def __len__(self):
        return self.batch_size


@dataclass(frozen=True)
class Sample:
    """A batch as a dataclass that cannot be changed."""

    x: Tensor
    y: Tensor


class Graph:
    """A batch of graphs: nodes, and which graph each is in; no container that anybody knows."""

    def __init__(self, x, y) -> None:
        self.x, self.y, self.sizes = x, y, [1] * len(y)


X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
BATCHES = {
    "mapping": (Tensors({"x": X, "y": Y}, 8), lambda b: (b["x"], b["y"], b.batch_size)),
    "dataclass": (Sample(X, Y), lambda b: (b.x, b.y, 8)),
    "graphs": ({"graph": Graph(X, Y), "y": Y}, lambda b: (b["graph"].x, b["y"], len(b["graph"].sizes))),
    "user dict": (UserDict(x=X, y=Y), lambda b: (b["x"], b["y"], len(b.data["y"]))),
    "named": (torch.nn.utils.rnn.pack_sequence(list(X[:, None])), lambda b: (b.data, Y, int(b.batch_sizes[0]))),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_keep_their_type(name):
    """Tensors in them are in the probe's type, everything else is as it was, and the real one is not touched."""
    batch, parts = BATCHES[name]
    types = []

    def loss(module, given):
        assert type(given) is type(batch)
        x, y, size = parts(given)
        types.append(x.dtype)
        assert size == len(y) == 8
        out = F.cross_entropy(module(x.clone()), y)
        x.zero_()
        return out

    assert find_scale_invariance(body(), batch, forward=loss, dtype="float64")["0.weight"].kind == "neuron"
    assert set(types) == {torch.float64}
    assert torch.equal(parts(batch)[0], X)


def test_only_what_is_understood_is_cut():
    """Tensors of one length beside plain values are cut to four samples; with anything else the batch stays whole."""
    assert [len(t) for t in few_samples((X, {"y": Y, "scale": 2.0}))[0:1]] == [4]
    for name in ("mapping", "dataclass", "graphs"):
        assert few_samples(BATCHES[name][0]) is BATCHES[name][0]


def test_warnings_of_a_step_are_not_shown_twice():
    """A warning that the user's code raises belongs to training."""

    def loss(module, x):
        warnings.warn("from the step", stacklevel=1)
        return module(x).exp().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_scale_invariance(body(), torch.randn(8, 6), forward=loss)
