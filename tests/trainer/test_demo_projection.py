"""``NormProjection()`` on the demo: what its first projection does to the function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_normreg import NormProjection
from lightning_normreg.demos import DemoConvNet, DigitsDataModule
from tests.harness import around_the_first_projection, moved, trainer


def projected_demo(epochs: int) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """The demo around its first projection after some epochs, and images: its batch, and those of validation."""
    torch.manual_seed(0)
    net, data = DemoConvNet(), DigitsDataModule()
    if epochs:
        trainer(max_epochs=epochs).fit(net, data)
    before, after = around_the_first_projection(NormProjection(), net, data)
    return before, after, [next(iter(loader))[0] for loader in (data.train_dataloader(), data.val_dataloader())]


def without_eps(module: nn.Module) -> nn.Module:
    """The module, in which the eps of BatchNorm is below the precision of the variances."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 1e-12
    return module


def norms(module: nn.Module) -> Tensor:
    """Norms of all filters."""
    filters = [m.weight.detach() for m in module.modules() if isinstance(m, nn.Conv2d)]
    return torch.cat([f.flatten(1).norm(dim=1) for f in filters])


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_trained_demo_keeps_its_function(epochs: int) -> None:
    """Outputs in both modes move by less than 1e-3: in training by what eps does, and but for that by less than 1e-5.

    With ρ = eps/(var + eps), about 1e-4 here, and norms n near 1/2, each of the four BatchNorms may change its output
    by ρ/2·|1 − n²|, in all some 1e-4. What is left without eps is roundoff, a few units of 6e-8.
    """
    before, after, batches = projected_demo(epochs)
    assert norms(before).max() < 0.9
    assert norms(after) == pytest.approx(torch.ones(96), rel=1e-6)
    for images in batches:
        assert max(moved(before, after, images)) < 1e-3
    without_eps(before), without_eps(after)
    for images in batches:
        assert moved(before, after, images)[0] < 1e-5


def test_a_fresh_demo_keeps_its_training_output() -> None:
    """As above; running statistics that have seen no batch are no function to keep, and stay 0 and 1."""
    before, after, (images, _) = projected_demo(epochs=0)
    assert norms(after) == pytest.approx(torch.ones(96), rel=1e-6)
    assert moved(before, after, images)[0] < 1e-3
    assert moved(without_eps(before), without_eps(after), images)[0] < 1e-5
    for norm in (m for m in after.modules() if isinstance(m, nn.BatchNorm2d)):
        assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
        assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
