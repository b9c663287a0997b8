"""A weight that is multiplied while it trains goes on in the same directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normreg import rescale_
from tests.optimizers._cases import Make, case

FACTOR = 3.7
BEFORE, AFTER = 15, 25
# With decay and an eps that count, so that whatever does not follow shows.
CASES: dict[str, tuple[Make, float]] = {
    "sgd": (case("torch.optim.SGD", weight_decay=0.1), 0.1),
    "momentum": (case("torch.optim.SGD", momentum=0.9, dampening=0.5, weight_decay=0.1), 0.1),
    "nesterov": (case("torch.optim.SGD", momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True), 0.05),
    "asgd": (case("torch.optim.ASGD", weight_decay=0.1, lambd=0.1, t0=20), 0.1),
    "adam": (case("torch.optim.Adam", weight_decay=0.1, eps=1e-2), 0.01),
    "amsgrad": (case("torch.optim.Adam", weight_decay=0.1, eps=1e-2, amsgrad=True), 0.01),
    "fused": (case("torch.optim.Adam", weight_decay=0.1, eps=1e-2, fused=True), 0.01),
    "adamw": (case("torch.optim.AdamW", weight_decay=0.5, eps=1e-2), 0.01),
    "nadam": (case("torch.optim.NAdam", weight_decay=0.1, eps=1e-2), 0.01),
    "nadamw": (case("torch.optim.NAdam", weight_decay=0.5, eps=1e-2, decoupled_weight_decay=True), 0.01),
    "radam": (case("torch.optim.RAdam", weight_decay=0.1, eps=1e-2), 0.05),
    "adamax": (case("torch.optim.Adamax", weight_decay=0.1, eps=1e-2), 0.01),
    "rmsprop": (case("torch.optim.RMSprop", weight_decay=0.1, eps=1e-2), 0.01),
    "rmsprop-all": (case("torch.optim.RMSprop", weight_decay=0.1, eps=1e-2, momentum=0.9, centered=True), 0.002),
    "adagrad": (case("torch.optim.Adagrad", weight_decay=0.1, eps=1e-2, initial_accumulator_value=0.1), 0.05),
    "adadelta": (case("torch.optim.Adadelta", weight_decay=0.1, eps=1e-3), 0.5),
    "rprop": (case("torch.optim.Rprop", step_sizes=(1e-3, 0.02)), 0.01),
    "adafactor": (case("torch.optim.Adafactor", weight_decay=0.1), 0.05),
    "adafactor-below-eps2": (case("torch.optim.Adafactor", weight_decay=0.1, eps=(None, 10.0)), 0.005),
    "lion": (case("lion_pytorch.Lion", weight_decay=0.5), 0.01),
    "lion-fixed": (case("lion_pytorch.Lion", weight_decay=0.005, decoupled_weight_decay=True), 0.01),
    "schedulefree-sgd": (case("schedulefree.SGDScheduleFree", weight_decay=0.1, warmup_steps=20), 0.1),
    "schedulefree-adamw": (case("schedulefree.AdamWScheduleFree", weight_decay=0.1, eps=1e-2), 0.01),
    "schedulefree-radam": (case("schedulefree.RAdamScheduleFree", weight_decay=0.1, eps=1e-2, r=1.0), 0.05),
    "sgdp": (case("adamp.SGDP", momentum=0.9, weight_decay=0.1, wd_ratio=0.5), 0.05),
    "adamp": (case("adamp.AdamP", weight_decay=0.5, eps=1e-12), 0.01),
    "lamb": (case("pytorch_optimizer.Lamb", weight_decay=0.1, weight_decouple=False, eps=1e-14), 0.01),
    "lamb-decoupled": (case("pytorch_optimizer.Lamb", weight_decay=0.5, eps=1e-14), 0.01),
    "lars": (case("pytorch_optimizer.LARS", weight_decay=0.1, momentum=0.9, trust_coefficient=0.1), 0.1),
    "shampoo": (
        case("pytorch_optimizer.Shampoo", weight_decay=0.1, preconditioning_compute_steps=2, matrix_eps=1e-2),
        0.05,
    ),
    "sgdw": (case("pytorch_optimizer.SGDW", momentum=0.9, weight_decay=0.1), 0.05),
    "adamp-coupled": (case("pytorch_optimizer.AdamP", weight_decay=0.1, weight_decouple=False, eps=1e-12), 0.01),
    "lion-coupled": (case("pytorch_optimizer.Lion", weight_decay=0.1, weight_decouple=False), 0.01),
    "lion-per-step": (case("pytorch_optimizer.Lion", weight_decay=0.005, fixed_decay=True), 0.01),
    "adopt": (case("pytorch_optimizer.ADOPT", weight_decay=0.1, eps=1e-2), 0.01),
    "transformers": (
        case("transformers.optimization.Adafactor", weight_decay=0.5, relative_step=False, eps=(1e-4, 1e-3), beta1=0.5),
        0.02,
    ),
    "transformers-unscaled": (
        case(
            "transformers.optimization.Adafactor",
            weight_decay=0.5,
            relative_step=False,
            scale_parameter=False,
            eps=(1e-4, 1e-3),
            beta1=0.5,
        ),
        0.01,
    ),
}
# Muon works in bfloat16, which keeps 3 digits, and SOAP takes its basis in float32.
ROUGH: dict[str, tuple[Make, float, float]] = {
    "muon": (case("torch.optim.Muon", weight_decay=0.5), 0.002, 1e-2),
    "soap": (case("pytorch_optimizer.SOAP", weight_decay=0.5, eps=1e-4, precondition_frequency=4), 0.001, 1e-6),
}


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    """Scalars that optimizers keep are in float64 as well, such as the learning rates of ASGD."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """A layer before BatchNorm, and one that is not scale-invariant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 8, bias=False)
        self.norm = nn.BatchNorm1d(8, affine=False, eps=1e-100)  # vanishes beside any variance
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.head(self.norm(self.layer(x)).relu())
        return out


def train(net: Net, optimizer: Optimizer, steps: range) -> None:
    """Steps on given batches."""
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(32, 6, generator=generator)
        y = torch.randint(3, (32,), generator=generator)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def directions(net: Net) -> dict[str, Tensor]:
    """The unit vector of the scale-invariant weight, and the other weight as it is."""
    weight = net.layer.weight.detach()
    return {"layer": weight / weight.norm(), "head": net.head.weight.detach().clone()}


def multiply(optimizer: Optimizer, weight: nn.Parameter) -> None:
    """What happens without a function for it."""
    with torch.no_grad():
        weight.mul_(FACTOR)


def nothing(optimizer: Optimizer, weight: nn.Parameter) -> None:
    """The run to compare with."""


def run(
    make: Make, lr: float, between: Callable[[Optimizer, nn.Parameter], object], before: int = BEFORE
) -> tuple[Net, float]:
    """The net after a run with something between its parts, and how far the layer turned after that."""
    net = Net()
    optimizer = make([net.layer.weight, net.head.weight], lr)
    train(net, optimizer, range(before))
    start = directions(net)["layer"]
    between(optimizer, net.layer.weight)
    train(net, optimizer, range(before, before + AFTER))
    return net, float((directions(net)["layer"] - start).norm())


def apart(net: Net, other: Net) -> float:
    """Largest difference in direction of the layer, or of the head as it is."""
    pairs = zip(directions(net).values(), directions(other).values(), strict=True)
    return max(float((a - b).norm()) for a, b in pairs)


def rescale(optimizer: Optimizer, weight: nn.Parameter) -> object:
    """What is tested."""
    return rescale_(optimizer, weight, FACTOR)


@pytest.mark.parametrize("name", CASES)
def test_directions_go_on(name: str) -> None:
    """In float64 to 1e-12, over as many steps again; without anything that follows they part."""
    # 25 steps of some dozen roundings of 1e-16 that are not amplified, as the runs are short and smooth.
    net, turned = run(*CASES[name], nothing)
    rescaled, _ = run(*CASES[name], rescale)
    alone, _ = run(*CASES[name], multiply)
    assert turned > 1e-2
    assert apart(net, rescaled) < 1e-12
    assert apart(net, alone) > 1e-4
    norms = [n.layer.weight.detach().norm() for n in (net, rescaled)]
    assert float(norms[1] / norms[0]) == pytest.approx(FACTOR, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "radam"])
def test_directions_from_the_start(name: str) -> None:
    """The same before the first step, when there is no state yet."""
    net, turned = run(*CASES[name], nothing, before=0)
    rescaled, _ = run(*CASES[name], rescale, before=0)
    assert turned > 1e-2
    assert apart(net, rescaled) < 1e-12


@pytest.mark.parametrize("name", ROUGH)
def test_directions_go_on_roughly(name: str) -> None:
    """As far as the precision goes that the optimizer works in."""
    make, lr, tolerance = ROUGH[name]
    net, turned = run(make, lr, nothing)
    rescaled, _ = run(make, lr, rescale)
    assert turned > 3 * tolerance
    assert apart(net, rescaled) < tolerance


def test_lbfgs_of_a_single_weight() -> None:
    """Its history follows; it can only be that of the weight."""
    nets, turned = [], 0.0
    for between in (nothing, rescale):
        net = Net()
        net.head.requires_grad_(False)
        optimizer = torch.optim.LBFGS([net.layer.weight], lr=0.05, history_size=4, max_iter=3)
        train(net, optimizer, range(BEFORE))
        start = directions(net)["layer"]
        between(optimizer, net.layer.weight)
        train(net, optimizer, range(BEFORE, BEFORE + 2))  # it amplifies rounding, as it divides by differences
        nets.append(net)
        turned = float((directions(net)["layer"] - start).norm())
    assert turned > 1e-2
    assert apart(*nets) < 1e-12
