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


def norms(module: nn.Module) -> Tensor:
    """Norms of all filters."""
    filters = [m.weight.detach() for m in module.modules() if isinstance(m, nn.Conv2d)]
    return torch.cat([f.flatten(1).norm(dim=1) for f in filters])


@pytest.mark.parametrize("epochs", [0, 1, 4])
def test_the_demo_keeps_its_function(epochs: int) -> None:
    """Its training output moves by less than 1e-5, its evaluation output by less than 1e-3, fresh or trained.

    With ρ = eps/(var + eps), about 1e-4 here, and norms n near 1/2, each of the four BatchNorms would change its output
    by ρ/2·|1 − n²| if its gain did not follow, in all some 1e-4. On other images the variance is another, so a fraction
    of that is left; on the batch itself it is roundoff, a few units of 6e-8 for each layer.
    """
    before, after, (images, others) = projected_demo(epochs)
    assert norms(before).max() < 0.9
    assert norms(after) == pytest.approx(torch.ones(96), rel=1e-6)
    training, evaluation = moved(before, after, images)
    assert training < 1e-5
    assert evaluation < 1e-3
    assert max(moved(before, after, others)) < 1e-3
