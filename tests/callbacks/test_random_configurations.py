"""Two hundred random configurations: none crashes without a clear message, breaks a weight, or logs what it cannot."""

from __future__ import annotations

import math
import re
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lion_pytorch import Lion
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import EffectiveLRMonitor, NormProjection, WeightNormMonitor, find_scale_invariance
from tests.harness import RecordingLogger, trainer


def _at(lr: float, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """With a learning rate that its constructor does not take, but a scheduler may set."""
    optimizer.param_groups[0]["lr"] = lr
    return optimizer


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd),
    "nesterov": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=wd),
    "adam": lambda p, lr, wd: torch.optim.Adam(p, lr=lr, weight_decay=wd),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd),
    "fused": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, fused=True),
    "rmsprop": lambda p, lr, wd: torch.optim.RMSprop(p, lr=lr, weight_decay=wd),
    "adagrad": lambda p, lr, wd: torch.optim.Adagrad(p, lr=lr, weight_decay=wd),
    "adafactor": lambda p, lr, wd: torch.optim.Adafactor(p, lr=lr, weight_decay=wd),
    "lion": lambda p, lr, wd: _at(lr, Lion(p, lr=1.0, weight_decay=wd)),
    "rprop": lambda p, lr, wd: torch.optim.Rprop(p, lr=lr),
    "two groups": lambda p, lr, wd: torch.optim.SGD(
        [{"params": p[:1], "lr": lr}, {"params": p[1:], "lr": torch.tensor(lr), "weight_decay": wd}]
    ),
}
NORMS: dict[str, Any] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "group": lambda n: nn.GroupNorm(2, n),
    "none": nn.Identity,
}
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed")


class Small(LightningModule):
    """Three matrices, one of them shared on request."""

    def __init__(self, norm: str, tied: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.norm = NORMS[norm](4)
        if tied:
            self.second.weight = self.first.weight
        self.make: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        hidden = torch.tanh(self.norm(self.first(batch[0])))
        return nn.functional.cross_entropy(self.head(torch.tanh(self.second(hidden))), batch[1])

    def configure_optimizers(self) -> Any:
        """Of all parameters, frozen ones included."""
        return self.make(list(self.parameters()))


@cache
def verdict(norm: str, tied: bool) -> Any:
    """What the probe finds in the clean model."""
    torch.manual_seed(0)
    return find_scale_invariance(Small(norm, tied), next(iter(data(torch.float32))))


def data(dtype: torch.dtype) -> DataLoader[Any]:
    """Four batches of four."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator).to(dtype)
    return DataLoader(TensorDataset(x, torch.randint(2, (16,), generator=generator)), 4)


def finite(module: nn.Module) -> list[Tensor]:
    """Which entries of the parameters are finite."""
    return [p.detach().isfinite() for p in module.parameters()]


class Guard(Callback):
    """Stands on both sides of the callbacks under test, and sees whether what was finite stays so.

    Args:
        other: The one on the other side; None for the first.
    """

    def __init__(self, other: Guard | None = None) -> None:
        self.other = other
        self.masks: list[Tensor] = []

    def _check(self, pl_module: Any) -> None:
        assert self.other is not None
        for before, after in zip(self.other.masks, finite(pl_module), strict=True):
            assert bool((after | ~before).all()), "a finite weight was made non-finite"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the weights as the optimizer leaves them: these hooks are older than the package's."""
        if self.other is None:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(lambda *_: setattr(self, "masks", finite(pl_module)))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Around the first projection."""
        if self.other is None:
            self.masks = finite(pl_module)
        else:
            self._check(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Around the step's projection."""
        if self.other is not None:
            self._check(pl_module)


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
        "lr": st.sampled_from([0.0, 1e-3, 0.3, 1e6]),
        "decay": st.sampled_from([0.0, 0.1]),
        "norm": st.sampled_from(sorted(NORMS)),
        "precision": st.sampled_from(PRECISIONS),
        "accumulate": st.sampled_from([1, 2, 3]),
        "unit": st.sampled_from(["auto", "neuron", "column", "layer"]),
        "radius": st.sampled_from(["auto", "initial", 1e-3, 2.5, 1e30]),
        "projection": st.sampled_from([True, True, True, False]),
        "on_not_invariant": st.sampled_from(["raise", "skip", *["allow"] * 6]),
        "include": st.sampled_from(
            [None, *[["*.weight"], ["first.*", "second.weight"], ["first.weight", "*.bias"]] * 2]
        ),
        "interval": st.sampled_from(["step", "epoch"]),
        "every": st.sampled_from([None, 1, 2]),
        "log_every": st.sampled_from([0, 1, 2]),
        "per_layer": st.sampled_from([True, False, "auto"]),
        "extras": st.booleans(),
        "tied": st.booleans(),
        "frozen": st.sampled_from([None, None, "first", "head"]),
        "exclude_frozen": st.sampled_from([True] * 7 + [False]),
        "damage": st.sampled_from([None, None, "zero unit", "zero", "nan", "inf", "tiny", "huge"]),
    }
)


def damaged(net: Small, damage: str | None) -> None:
    """Do that to the first weight."""
    with torch.no_grad():
        weight = net.first.weight
        if damage == "zero unit":
            weight[1] = 0.0
        elif damage == "zero":
            weight.zero_()
        elif damage in ("nan", "inf"):
            weight[0, 0] = float(damage)
        elif damage == "tiny":
            weight.mul_(1e-30)
        elif damage == "huge":
            weight.mul_(1e30)


def run(c: dict[str, Any]) -> tuple[RecordingLogger, list[str], str]:
    """Rows, warnings, and the error if there was one."""
    torch.manual_seed(0)
    net = Small(c["norm"], c["tied"])
    damaged(net, c["damage"])
    if c["frozen"]:
        getattr(net, c["frozen"]).requires_grad_(False)
    net.make = lambda parameters: OPTIMIZERS[c["optimizer"]](parameters, c["lr"], c["decay"])
    options: dict[str, Any] = {"precision": c["precision"]}
    if c["precision"] == "16-mixed":
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]}
    known = verdict(c["norm"], c["tied"])
    common = {"unit": c["unit"], "invariance": known}
    shown = {"logging_interval": c["interval"], "per_layer": c["per_layer"]}
    extras = {"gradient": c["extras"], "scale_exponent": c["extras"], "momentum_gain": c["extras"]}
    exclude = [f"{c['frozen']}.*"] if c["frozen"] and c["exclude_frozen"] else []
    choice = {"include": c["include"], "exclude": exclude, "on_not_invariant": c["on_not_invariant"]}
    projection = [NormProjection(c["radius"], **choice, **common)] if c["projection"] else []
    first = Guard()
    callbacks = [
        first,
        WeightNormMonitor(c["every"], **common, **shown),
        EffectiveLRMonitor(c["every"], **common, **shown, **extras),
        *projection,
        Guard(first),
    ]
    fitted = trainer(*callbacks, accumulate_grad_batches=c["accumulate"], log_every_n_steps=c["log_every"], **options)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(c["precision"], torch.float32)
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fitted.fit(net, data(dtype))
        except (ValueError, TypeError) as raised:
            error = str(raised)
    assert isinstance(fitted.logger, RecordingLogger)
    return fitted.logger, [str(w.message) for w in caught], error


CLEAR = re.compile(r"`\w+` must |must be held by one|There must be something to act on|It must be known which")


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(CONFIGURATIONS)
def test_any_configuration(c: dict[str, Any]) -> None:
    """An error names an argument and its rule; a value that is not finite is one of a parameter that was warned of."""
    logger, said, error = run(c)
    assert not error or CLEAR.search(error), error
    explained = {name for text in said if "infinite or NaN" in text for name in re.findall(r"'([\w.]+)'", text)}
    for _, row in logger.rows:
        odd = {tag for tag, value in row.items() if not math.isfinite(value)}
        layers = {tag.split("/")[2] for tag in odd if "/layers/" not in tag}
        assert layers <= explained, (odd, said)
        if odd and c["per_layer"] is not False:
            assert layers or explained, (odd, said)
        elif odd:
            assert explained, (odd, said)
