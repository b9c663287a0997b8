"""Signs of trouble: each is said once, with the layer's name, and can stop the run; healthy runs are quiet."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn

from lightning_normreg import EffectiveLRMonitor, WeightNormMonitor
from tests.harness import Net, RecordingLogger, loader, sgd, trainer


class Tiny(Net):
    """Steps too small for the type of the weights."""

    def __init__(self, lr: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(lambda groups: torch.optim.SGD([p for g in groups for p in g["params"]], lr=lr), False)
        self.to(dtype)


class Explode(Callback):
    """Multiplies a weight after the second batch, the way a bad step would."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Once."""
        if batch_idx == 1:
            with torch.no_grad():
                pl_module.conv1.weight.mul_(1e3)


class Poison(Callback):
    """Puts one NaN into a weight after the second batch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Once."""
        if batch_idx == 1:
            with torch.no_grad():
                pl_module.head.weight[0, 0] = float("nan")


class Erase(Callback):
    """Makes a filter zero after the second batch; nothing reaches it from then on."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Once."""
        if batch_idx == 1:
            with torch.no_grad():
                pl_module.head.weight.zero_()
            pl_module.head.weight.register_hook(torch.zeros_like)


TROUBLE: dict[str, tuple[Any, list[Any], str, int]] = {
    "lost": (lambda: Tiny(1e-20), [], r"[146] of [146] units of '\S+' with a gradient did not move", 3),
    "exploded": (lambda: Net(sgd()), [Explode()], r"A unit of 'conv1\.weight' has grown to norm \d+, from at most", 1),
    "wild": (lambda: Net(sgd()), [Poison()], r"'head\.weight' has infinite or NaN entries, and so have its curves", 1),
    "zero": (lambda: Net(sgd()), [Erase()], r"1 units of 'head\.weight' are zero: they have no direction", 1),
}


@pytest.mark.parametrize("trouble", list(TROUBLE))
@pytest.mark.parametrize("action", ["warn", "stop", "ignore"])
def test_trouble(trouble: str, action: Any) -> None:
    """One warning for each layer in trouble; ``"stop"`` ends the run after that batch, ``"ignore"`` says nothing."""
    make, callbacks, message, layers = TROUBLE[trouble]
    torch.manual_seed(0)
    run = trainer(EffectiveLRMonitor(on_unhealthy=action), *callbacks, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(make(), loader())
    said = [str(w.message) for w in caught if re.search(message, str(w.message))]
    assert len(said) == (0 if action == "ignore" else layers), [str(w.message) for w in caught]
    first_sign = 1 if trouble == "lost" else 3
    assert run.global_step == (first_sign if action == "stop" else 12)


@pytest.mark.parametrize("make", [WeightNormMonitor, EffectiveLRMonitor])
def test_units_that_are_zero_from_the_start_do_not_stop(make: Any) -> None:
    """A head that starts at zero is a choice: said, not stopped."""
    net = Net(sgd())
    with torch.no_grad():
        net.head.weight[0] = 0.0
        net.head.weight[1:] *= 0.1  # and grows
    options = {"on_unhealthy": "stop"} if make is EffectiveLRMonitor else {}
    run = trainer(make(unit="neuron", **options))
    with pytest.warns(UserWarning, match="1 units of 'head.weight' are zero"):
        run.fit(net, loader())
    assert run.global_step == 6


def test_a_rate_of_zero_and_a_dead_layer_are_not_lost_updates() -> None:
    """A warm-up that starts at 0 moves nothing, and neither does a gradient of zero: warnings would be errors."""

    class WarmUp(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    trainer(EffectiveLRMonitor()).fit(WarmUp(sgd()), loader())
    net = Net(sgd())
    net.head.weight.register_hook(torch.zeros_like)
    trainer(EffectiveLRMonitor()).fit(net, loader())


def test_bfloat16_weights_lose_small_steps() -> None:
    """The same run is healthy in float32, and stands still in bfloat16: said for every layer that does."""
    torch.manual_seed(0)
    healthy = Tiny(1e-4)
    trainer(EffectiveLRMonitor()).fit(healthy, loader())  # warnings are errors
    torch.manual_seed(0)
    frozen = Tiny(1e-4, torch.bfloat16)
    start = frozen.conv1.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"below what torch\.bfloat16 can add to the weight"):
        trainer(EffectiveLRMonitor(), precision="bf16-true").fit(frozen, loader(dtype=torch.bfloat16))
    assert (start == frozen.conv1.weight).float().mean() > 0.5


def test_a_gradient_that_is_not_finite_is_explained() -> None:
    """Its own curve is NaN; the weight, which an optimizer that looks at signs alone moves, is not."""

    class Sign(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad.nan_to_num().sign(), alpha=1e-3)

    net = Net(lambda groups: Sign([p for g in groups for p in g["params"]]), schedule=False)
    net.head.weight.register_hook(lambda g: g * float("nan"))
    run = trainer(EffectiveLRMonitor(gradient=True, include=["head.weight"]))
    with (
        pytest.warns(
            UserWarning, match="Curves of 'head.weight' are infinite or NaN, because its gradient is"
        ) as caught,
        pytest.warns(UserWarning, match="`effective_lr` is left out for the weights of Sign"),
    ):
        run.fit(net, loader())
    assert len([w for w in caught if "infinite or NaN" in str(w.message)]) == 1
    assert run.callback_metrics["weights/relative_update/head.weight"].isfinite()


def test_an_action_that_is_unknown() -> None:
    """Named, with the value."""
    with pytest.raises(ValueError, match="`on_unhealthy` must be 'warn', 'stop' or 'ignore', got 'raise'"):
        EffectiveLRMonitor(on_unhealthy="raise")


def test_the_copy_is_there_before_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    """Its size is said once; later steps use the same memory; what is not optimized or never logged has none."""
    seen: list[dict[Any, int]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            tracker = trainer.callbacks[0]._tracker
            seen.append({p: s.data_ptr() for p, s in tracker.record.copies.items()})

    net = Net(sgd())
    net.spare = nn.Linear(100, 100)
    with caplog.at_level("INFO"):
        trainer(EffectiveLRMonitor(), Look()).fit(net, loader())
    assert len(seen) == 6
    assert seen[0].keys() == {net.conv1.weight, net.up.weight, net.head.weight}
    assert all(step == seen[0] for step in seen)
    size = 4e-6 * sum(p.numel() for p in seen[0])
    said = [r.getMessage() for r in caplog.records if "keeps a copy" in r.getMessage()]
    assert said == [f"EffectiveLRMonitor keeps a copy of the watched weights: {size:.3g} MB."]
    seen.clear()
    trainer(EffectiveLRMonitor(), Look(), log_every_n_steps=0).fit(Net(sgd()), loader())
    assert not any(seen)


def test_curves_do_not_change_with_the_action() -> None:
    """Judging is not measuring."""
    rows = []
    for action in ("warn", "ignore"):
        torch.manual_seed(0)
        run = trainer(EffectiveLRMonitor(on_unhealthy=action))
        run.fit(Net(sgd()), loader())
        assert isinstance(run.logger, RecordingLogger)
        rows.append(run.logger.rows)
    assert rows[0] == rows[1]
