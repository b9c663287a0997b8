"""Optimizers that step during the backward pass: followed where the Trainer knows them, else refused in words."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_normreg import EffectiveLRMonitor, NormProjection, WeightNormMonitor, find_scale_invariance
from tests.harness import Net, RecordingLogger, loader, sgd, trainer

LR = 0.1


class InBackward(Net):
    """One optimizer for each parameter, which steps as soon as the gradient is there, and forgets it."""

    def __init__(self) -> None:
        super().__init__(sgd())
        self.each = {name: torch.optim.SGD([p], lr=LR) for name, p in self.named_parameters()}
        for name, p in self.named_parameters():
            p.register_post_accumulate_grad_hook(partial(self.update, name))

    def update(self, name: str, parameter: Tensor) -> None:
        """In place of the step."""
        self.each[name].step()
        self.each[name].zero_grad()


class Nobody(InBackward):
    """The Trainer has no optimizer."""

    def configure_optimizers(self) -> None:
        """None."""


class Dummy(InBackward):
    """The Trainer has one, for a scheduler, that finds no gradients."""

    def configure_optimizers(self) -> Any:
        """Of all parameters."""
        return torch.optim.SGD(self.parameters(), lr=LR)


class Known(InBackward):
    """The Trainer has all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Backward is all."""
        before = self.head.weight.detach().clone()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.seen.append((before, self.head.weight.detach().clone()))

    def configure_optimizers(self) -> Any:
        """One for each parameter."""
        return list(self.each.values())


REFUSED = r"'conv1\.weight' and 7 more parameters were written during the backward pass .* return those of the hooks"


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("make", [Nobody, Dummy])
@pytest.mark.parametrize("callback", [EffectiveLRMonitor, WeightNormMonitor, NormProjection])
def test_optimizers_that_the_trainer_does_not_know(make: Any, callback: Any) -> None:
    """Nothing could be measured or held: an error in the first batch says so, and what to do."""
    with pytest.raises(NotImplementedError, match=REFUSED):
        trainer(callback()).fit(make(), loader())


@pytest.mark.filterwarnings(
    "ignore:Running statistics could not follow"
)  # because training_step cannot be called on a copy
def test_optimizers_that_the_trainer_knows() -> None:
    """Their steps are measured and projected as any others."""
    torch.manual_seed(0)
    net = Known()
    verdict = find_scale_invariance(net, next(iter(loader())), forward=lambda m, b: Net.training_step(m, b, 0))
    run = trainer(EffectiveLRMonitor(invariance=verdict), NormProjection(invariance=verdict))
    run.fit(net, loader())
    # Held once, at the start, they end 2e-4 off.
    assert net.conv1.weight.detach().flatten(1).norm(dim=1) == pytest.approx(torch.ones(6), abs=1e-6)
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    assert [value for _, value in logger.curves("weights/effective_lr/conv1.weight")] == pytest.approx(
        [LR] * 6, rel=1e-6
    )
    turned = [2 * torch.asin((a / a.norm() - b / b.norm()).norm() / 2).item() for a, b in net.seen]
    # Float32 weights: the chord of directions 1e-2 apart keeps 6e-8 / 1e-2.
    assert [value for _, value in logger.curves("weights/rotation/head.weight")] == pytest.approx(turned, rel=1e-4)


class ByHand(Net):
    """Writes its weights itself."""

    def __init__(self) -> None:
        super().__init__(sgd())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Gradient descent, without an optimizer."""
        gradients = torch.autograd.grad(super().training_step(batch, batch_idx), self.parameters())
        with torch.no_grad():
            torch._foreach_sub_(list(self.parameters()), gradients)


@pytest.mark.filterwarnings(
    "ignore:Which weights are scale-invariant could not", "ignore:Running statistics could not follow"
)
@pytest.mark.parametrize("callback", [EffectiveLRMonitor, WeightNormMonitor, NormProjection])
def test_steps_that_are_never_seen_are_said_at_the_end(callback: Any) -> None:
    """Whatever updates the weights, it was no optimizer of the Trainer."""
    options = {"on_not_invariant": "allow"} if callback is NormProjection else {}
    with pytest.warns(UserWarning, match="No step of SGD has been seen in 6 batches although its weights"):
        trainer(callback(include=["conv1.weight"], unit="neuron", **options)).fit(ByHand(), loader())
